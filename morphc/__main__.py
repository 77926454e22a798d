"""`python -m morphc`: the same as the `morphc` command."""

import sys
from pathlib import Path

import morphc

# -m puts the current folder on the path, which the command doesn't have. In a checkout that makes the room
# `kernels/` look like the PyPI package of that name to transformers, which then fails to import.
_CHECKOUT = Path(morphc.__file__).resolve().parent.parent
sys.path[:] = [
    entry for entry in sys.path if Path(entry or ".").resolve() / "kernels" != (_CHECKOUT / "kernels")
]

from morphc.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
