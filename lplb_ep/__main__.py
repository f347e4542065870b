"""`python -m lplb_ep` is the command `lplb-ep`."""

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
