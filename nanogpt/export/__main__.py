"""`python -m nanogpt.export` is the command `nanogpt export`."""

import sys

from nanogpt.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
