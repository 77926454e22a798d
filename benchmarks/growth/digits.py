"""The two experiments on the digits: options, baselines, and ours, method by method."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.growth.common import Results, options, single_thread, timed
from benchmarks.growth.plasticity import Method, Outcome, Stream, train
from benchmarks.growth.recycling import Recycling, train_one


def run(
    name: str,
    description: str,
    stream: Stream,
    methods: Mapping[str, Method],
    ours: Mapping[str, Recycling],
    score: str,
    seeds: int = 5,
) -> None:
    """Train every wanted method and store `score` (`end` or `online`), averaged over the stream's window."""
    arguments = options(description, seeds=seeds).parse_args()
    single_thread()
    chosen = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    results = Results(
        name, arguments, kind=stream.kind, images=stream.images, epochs=stream.epochs, tasks=stream.tasks
    )

    def store(method: str, outcome: Outcome, seconds: float) -> None:
        accuracy = getattr(outcome, score)
        results.add(
            method,
            accuracy[-stream.window :].mean(0).tolist(),
            seconds,
            curve=accuracy.mean(1),
            recycled=outcome.recycled,
        )

    wanted = {method: how for method, how in methods.items() if results.wanted(method)}
    if wanted:
        outcomes, seconds = timed(lambda: train(wanted, stream, chosen))
        for method, outcome in outcomes.items():
            store(method, outcome, seconds / len(wanted))
    for method, how in ours.items():
        if results.wanted(method):
            runs, seconds = timed(lambda how=how: [train_one(how, stream, seed) for seed in chosen])
            store(method, Outcome(*(torch.cat(parts, -1) for parts in zip(*runs, strict=True))), seconds)
