"""`python -m nanogpt COMMAND` is the console script `nanogpt COMMAND`."""

import sys

from nanogpt.cli import main

sys.exit(main())
