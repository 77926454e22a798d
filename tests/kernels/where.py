"""Where the tests of this folder run kernels: on the CPU in Triton's interpreter, or on a GPU if told to.

One process can do only one of the two, because Triton reads TRITON_INTERPRET when it is imported. So on any machine
the whole of the tests is interpreted; `MORPHC_TEST_DEVICE=cuda pytest tests/kernels` runs those on the GPU that
take a device, and says of the rest that it left them out.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("MORPHC_TEST_DEVICE", "cpu"))
