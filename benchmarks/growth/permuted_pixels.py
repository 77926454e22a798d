"""D. Permuted pixels: how fast is the two-hundredth task learned?

1536 digits, their pixels permuted anew 200 times, 2 epochs each. Reported is the online accuracy (each batch
before its step), averaged over the last 40 tasks.

    python -m benchmarks.growth.permuted_pixels
"""

from __future__ import annotations

from benchmarks.growth.digits import run
from benchmarks.growth.plasticity import Method, Stream
from benchmarks.growth.recycling import Recycling

STREAM = Stream("pixels", images=1536, epochs=2, tasks=200, window=40)
METHODS = {
    "none": Method(),
    "ReDo": Method(tau=0.025, every=100, ema=0.0),
    "shrink and perturb": Method(shrink=(0.8, 0.4)),
    "L2-init": Method(l2_init=6e-4),
    "L2-init + moment reset": Method(l2_init=6e-4, reset=True),
    "recycling, plain torch": Method(6e-4, 0.1, "gradient"),
    "recycling + reset, plain torch": Method(6e-4, 0.1, "gradient", reset=True),
    "recycling of the best of 256, plain torch": Method(6e-4, 0.1, "gradient", candidates=256),
    "recycling of the best of 256 + reset, plain torch": Method(
        6e-4, 0.1, "gradient", reset=True, candidates=256
    ),
    "growth 32 to 64 + recycling of the best of 256, plain torch": Method(
        6e-4, 0.1, "gradient", candidates=256, start=32, grow_every=480
    ),
}

OURS = {
    "morphc: recycling": Recycling(),
    "morphc: recycling of the best of 256": Recycling(candidates=256),
}

if __name__ == "__main__":
    run("permuted_pixels", __doc__, STREAM, METHODS, OURS, "online")
