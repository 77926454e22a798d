"""A model file's text, and `morphc` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MLP = """
    import torch
    from torch import nn

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(16, 32)
            self.fc2 = nn.Linear(32, 4)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    model = MLP()
    example_inputs = (torch.randn(3, 16),)
"""


def start_morphc(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """`morphc` as a process of its own, for signals and for looking at what it imports."""
    return subprocess.Popen(
        [sys.executable, "-m", "morphc", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )
