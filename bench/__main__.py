"""`python -m bench`: the same as the command `dropbp bench`."""

from __future__ import annotations

import sys

from dropbp.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
