"""`python -m moextend_pl`."""

import sys

from moextend_pl.cli.commands import shell

if __name__ == "__main__":
    sys.exit(shell(sys.argv[1:]))
