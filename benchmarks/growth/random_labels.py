"""C. Random labels, again and again: does the network still learn the sixtieth task?

512 digits get new random labels 60 times, 20 epochs each. Reported is the accuracy on the task's own images at
its end, averaged over the last 12 tasks.

    python -m benchmarks.growth.random_labels
"""

from __future__ import annotations

from benchmarks.growth.digits import run
from benchmarks.growth.plasticity import Method, Stream
from benchmarks.growth.recycling import Recycling

STREAM = Stream("labels", images=512, epochs=20, tasks=60, window=12)
METHODS = {
    "none": Method(),
    "ReDo": Method(tau=0.025, every=100, ema=0.0),
    "shrink and perturb": Method(shrink=(0.8, 0.4)),
    "L2-init": Method(l2_init=1e-3),
    "L2-init + moment reset": Method(l2_init=6e-4, reset=True),
    "recycling, plain torch": Method(6e-4, 0.1, "gradient"),
    "recycling + reset, plain torch": Method(6e-4, 0.1, "gradient", reset=True),
    "recycling of the best of 256, plain torch": Method(6e-4, 0.1, "gradient", candidates=256),
    "recycling of the best of 256 + reset, plain torch": Method(
        6e-4, 0.02, "gradient", reset=True, candidates=256
    ),
    "growth 32 to 64 + recycling of the best of 256 + reset, plain torch": Method(
        6e-4, 0.02, "gradient", reset=True, candidates=256, start=32, grow_every=480
    ),
    "growth 32 to 64 + L2-init + reset, plain torch": Method(
        6e-4, -1.0, "gradient", reset=True, candidates=256, start=32, grow_every=480
    ),
}

OURS = {
    "morphc: recycling": Recycling(),
    "morphc: recycling of the best of 256 + reset": Recycling(tau=0.05, reset=True, candidates=256),
}

if __name__ == "__main__":
    run("random_labels", __doc__, STREAM, METHODS, OURS, "end", seeds=10)
