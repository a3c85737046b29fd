"""``python -m featvis_func``: the command line."""

import sys

from featvis_func.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
