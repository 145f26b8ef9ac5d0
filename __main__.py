"""`python -m trimaran`: the same as the `trimaran` command."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
