"""Sample Factory's Atari example with one import more: ale_py, which tells gymnasium its games.

Sample Factory 2.1.1 wants gymnasium below 1.0, which does not find the games of ale-py 0.10; those
of ale-py 0.8, which it finds, come without ROMs. Its processes import this file, too.
`pong_policies.py` runs it in Sample Factory's own environment.
"""

import sys

import ale_py  # noqa: F401
from sf_examples.atari.train_atari import main

if __name__ == "__main__":
    sys.exit(main())
