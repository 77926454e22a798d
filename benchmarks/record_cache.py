"""Record the terminal session of README.md: run the commands, and put what they print between the markers.

    python benchmarks/record_cache.py

The commands run in an empty home of their own, which is shown as ~; long outputs are cut where `...` stands.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- recorded by benchmarks/record_cache.py -->\n", "<!-- end of the recording -->\n"
KERNEL = "forward_bottleneck_h512_s64_k7_r16_fp32"
OTHER = "forward_bottleneck_h512_s64_k7_r32_fp32"

# Command, the lines of its output that are shown: how many at the beginning and at the end.
SESSION = (
    ("morphc compile mlp.py --seeds 64 --target cuda:90 -o out | sed -n '/^kernels/,$p'", 7, 2),
    ("morphc cache ls", 99, 0),
    (f"morphc cache show {KERNEL} --no-source", 99, 0),
    (f"morphc cache why-miss {OTHER}", 99, 0),
    ("morphc cache verify", 99, 0),
    ("truncate -s 100 ~/.cache/morphc/v1/kernels/report_*/kernel.py && morphc cache verify", 99, 0),
    ("morphc cache prune --yes", 99, 0),
    ("morphc cache export forwards.tar.gz forward_bottleneck_h512 --arch cuda:90", 99, 0),
    ("export MORPHC_CACHE_DIR=~/of-another-machine", 0, 0),
    ("morphc compile mlp.py --seeds 64 --target cuda:90 --require-cached | sed -n '/^kernels/,$p'", 2, 1),
    ("morphc cache import out/kernels.tar.gz", 99, 0),
    ("morphc compile mlp.py --seeds 64 --target cuda:90 --require-cached | sed -n '/^kernels/,$p'", 99, 0),
)


def record() -> str:
    """The session, as a block of Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copy(ROOT / "examples" / "mlp.py", home)
        (home / "bin").mkdir()
        (home / "bin" / "morphc").write_text(f'#!/bin/sh\nexec {sys.executable} -m morphc "$@"\n')
        (home / "bin" / "morphc").chmod(0o755)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MORPHC_", "XDG_"))}
        path = f"{home / 'bin'}:{os.environ['PATH']}"
        env = {
            **kept,
            "HOME": folder,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
        }
        lines = []
        for command, first, last in SESSION:
            lines.append(f"$ {command}")
            if command.startswith("export "):
                env["MORPHC_CACHE_DIR"] = str(home / command.rpartition("/")[2])
                continue
            run = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command],
                cwd=home,
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            found = [_shown(line, folder) for line in run.stdout.splitlines()]
            hidden = found[first : len(found) - last]
            lines += (
                [*found[:first], *(["..."] if hidden else []), *found[len(found) - last :]]
                if hidden
                else found
            )
            lines += [_shown(line, folder) for line in run.stderr.splitlines() if "warning" in line]
            if run.returncode:
                lines.append(f"(exit status {run.returncode})")
            lines.append("")
    while not lines[-1]:
        lines.pop()
    return "\n".join(["```console", *lines, "```", ""])


def _shown(line: str, folder: str) -> str:
    return re.sub(rf"(/private)?{re.escape(folder)}", "~", line).rstrip()


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{record()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
