"""Says that Ray has ended a run's process: Ray does so without a word when its raylet is gone.

`python last_words.py PID RAYLET_PID RUN LOG` waits, beside the run, for the end of its process. If
the raylet was gone then, too, and the run's status says that it still runs, it writes the failure
into the status and to standard error. It imports the standard library only, to be small.
"""

import json
import os
import re
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

GRACE_MS = 2000  # a raylet that ends may be a moment later than the process that it takes along


def begin(raylet_pid: int, run: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Starts the process beside this one; the caller ends it."""
    arguments = (str(os.getpid()), str(raylet_pid), str(run), str(log))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is meant for the run
    )


def why(pid: int, log: Path) -> str:
    """Says why a raylet has ended, by its own last words if it had the time for any."""
    with suppress(OSError):
        text = log.read_text(errors="replace")
        agents: list[str] = re.findall(r"one Ray agent failed, agent_name = (\w+)", text)
        if agents:
            return f"its raylet (process {pid}) has ended, as its {agents[-1]} was lost"
    return f"its raylet (process {pid}) has ended, as when it is killed; see {log}"


def main() -> None:
    pid, raylet_pid, run, log = int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:])
    process, raylet = os.pidfd_open(pid), os.pidfd_open(raylet_pid)
    if os.getppid() != pid:
        return
    wait(process, None)
    status = run / "status.json"
    told = json.loads(status.read_bytes())
    if told["pid"] != pid or told["state"] != "running" or not wait(raylet, GRACE_MS):
        return
    error = f"Ray's node on this machine is lost, and it ended this run: {why(raylet_pid, log)}"
    whole = status.with_name(".status.json.last-words")
    whole.write_text(json.dumps(told | {"state": "failed", "error": error}))
    whole.replace(status)
    print(f"rlx: {error}", file=sys.stderr)
    if any((run / "checkpoints").glob("[0-9]*")):
        print(f"rlx: resume={run} goes on from the last checkpoint", file=sys.stderr)


def wait(process: int, limit_ms: int | None) -> bool:
    """Says whether the process has ended within so many milliseconds."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(limit_ms))


if __name__ == "__main__":
    with suppress(OSError, ValueError, KeyError):  # the folder may be gone; nobody reads of it
        main()
