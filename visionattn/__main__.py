"""`python -m visionattn`: the command line."""

import sys

from visionattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
