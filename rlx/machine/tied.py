"""`python -m rlx.machine.tied PARENT CORES COMMAND...` becomes a command that ends with its parent.

PARENT: the process id of who started it. CORES: such as 0,1, that it may run on; empty: all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, cores, *command = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # which Ray's workers inherit
    if sys.platform == "linux":  # SIGTERM when the parent is gone, however that came
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if cores:
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    if os.getppid() == int(parent):  # else it was gone before
        os.execv(command[0], command)


if __name__ == "__main__":
    main()
