"""``python -m molf``, the same as ``molf``."""

import sys

from molf.cli import main

if __name__ == "__main__":
    sys.exit(main())
