"""`python -m dropbp`: the same as the command `dropbp`."""

from __future__ import annotations

import sys

from dropbp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
