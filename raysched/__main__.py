"""`python -m raysched` is `raysched`."""

from __future__ import annotations

import sys

from raysched.cli import main

if __name__ == "__main__":
    sys.exit(main())
