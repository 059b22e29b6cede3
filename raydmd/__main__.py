"""``python -m raydmd``."""

from raydmd.cli import main

if __name__ == "__main__":
    main()
