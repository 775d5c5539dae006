"""`python -m moextend_pl`."""

import sys

from moextend_pl.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
