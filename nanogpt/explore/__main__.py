"""`python -m nanogpt.explore` is the command `nanogpt explore`."""

import sys

from nanogpt.cli import main

sys.exit(main(["explore", *sys.argv[1:]]))
