"""``python -m flashcore_sglang``: see cli.py."""

import sys

from flashcore_sglang.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
