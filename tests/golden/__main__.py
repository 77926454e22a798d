"""`python -m tests.golden` accepts the generated files as they are now; the diff is for you to read."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))

from golden_cases import KEPT, sources


def main() -> None:
    made = {f"{name}.py": source.text for name, source in sources().items()}
    for path in sorted(KEPT.glob("[a-z]*.py")):
        if path.name not in made:
            path.unlink()
            print(f"gone     {path.name}")
    for name, text in sorted(made.items()):
        path = KEPT / name
        before = path.read_text() if path.exists() else None
        if text != before:
            path.write_text(text)
            print(f"{'changed' if before else 'new    '}  {name}")


if __name__ == "__main__":
    main()
