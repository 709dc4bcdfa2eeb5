"""``python -m uvas``."""

import sys

from uvas.cli import main

if __name__ == "__main__":
    sys.exit(main())
