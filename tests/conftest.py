"""Triton is interpreted in a run of the tests, or compiles, if all of the run is `tests/gpu` or the device is a GPU."""

from __future__ import annotations

import gc
import importlib
import os
import signal
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A run in a shell's background ignores it, and so would the programs that tests start to interrupt them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Triton reads the variable for its own functions when it is imported, once, and any test file may import it
    # by way of torch: so before all of them. Other tests of the same run are to find their backend as users do,
    # so the variable is set for these alone (see `kernels/conftest.py`).
    chosen = [Path(config.invocation_params.dir, arg.split("::")[0]).resolve() for arg in config.args]
    on_gpu = bool(chosen) and all(HERE / "gpu" in (path, *path.parents) for path in chosen)
    with pytest.MonkeyPatch.context() as patch:
        if not on_gpu and os.environ.get("MORPHC_TEST_DEVICE", "cpu") == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("triton.language")


def pytest_collection_finish() -> None:
    # Of the time of a whole run a seventh goes into looking through torch and transformers for garbage.
    gc.set_threshold(20_000, 20, 20)
    gc.collect()
    gc.freeze()
