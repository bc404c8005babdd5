"""Replay: earlier nights' examples again, so that a night does not unlearn the ones before it.

A fixed share, as a plain form of replay scheduling (Klasson et al., arXiv 2209.08660); which examples
follows from their hash and the seed, so the same snapshot gives the same dataset.
"""

from __future__ import annotations

from collections.abc import Iterable

from memory.records import Example, ExampleKind, content_hash


def replay(earlier: Iterable[Example], *, new: int, share: float, seed: int) -> list[Example]:
    """`share` earlier SFT examples for each of `new` ones, workloads in turn, without repeats."""
    by_workload: dict[str, list[Example]] = {}
    unique = {e.content_hash: e for e in earlier if e.kind is ExampleKind.SFT}
    for example in sorted(unique.values(), key=lambda e: content_hash([seed, e.content_hash])):
        by_workload.setdefault(example.workload, []).append(example)
    picked: list[Example] = []
    wanted = min(round(new * share), len(unique))
    while len(picked) < wanted:
        for workload in sorted(by_workload):
            if by_workload[workload] and len(picked) < wanted:
                picked.append(by_workload[workload].pop(0))
    return picked
