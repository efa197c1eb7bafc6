"""``python -m flashcore_sglang``: can this machine serve, and what is missing (see doctor.py)."""

import sys

from flashcore_sglang.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
