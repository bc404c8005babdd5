"""Replay: earlier nights' examples again, so that a night does not unlearn the ones before it.

Replay scheduling (Klasson et al., arXiv 2209.08660): which old tasks to replay when matters while there is
room for few. A fixed share is the plain form; `replay_shares` raises it where retention dropped. Which
examples follows from their hash, the seed and the champion, so the same snapshot gives the same dataset.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from memory.night_records import Evaluation
from memory.records import Example, ExampleKind, content_hash


def replay(
    earlier: Iterable[Example],
    *,
    new: int,
    share: float,
    seed: int,
    champion: int = 0,
    shares: Mapping[str, float] | None = None,
    fits: Callable[[Example], bool] = lambda _: True,
) -> list[Example]:
    """`share` earlier SFT examples for each of `new` ones, workloads in turn, without repeats, of those that `fits`
    lets through; it is asked once for each, in an order that only the seed and the `champion` decide: from each
    generation other examples come again.

    With `shares` (`replay_shares`) the total goes by their mean, so that equal ones come to the same as one, and a
    workload's part by its own; what one has too few examples for goes to the others.
    """
    by_workload: dict[str, list[Example]] = {}
    unique = {e.content_hash: e for e in earlier if e.kind is ExampleKind.SFT}
    for example in sorted(unique.values(), key=lambda e: content_hash([seed, champion, e.content_hash])):
        if fits(example):
            by_workload.setdefault(example.workload, []).append(example)
    own = {workload: (shares or {}).get(workload, share) for workload in sorted(by_workload)}
    wanted = round(new * fmean(own.values())) if own else 0
    picked: list[Example] = []
    taken: Counter[str] = Counter()
    while len(picked) < wanted and (left := [workload for workload in own if by_workload[workload]]):
        # Highest averages (D'Hondt): with equal shares, one after the other.
        workload = max(left, key=lambda name: own[name] / (taken[name] + 1))
        picked.append(by_workload[workload].pop(0))
        taken[workload] += 1
    return picked


def replay_shares(
    share: float, before: Mapping[str, float], now: Mapping[str, float], *, gain: float = 5.0, most: float = 3.0
) -> dict[str, float]:
    """Each workload's replay share by its retention: success in 0..1 at its last good evaluation and now.

    Every tenth of success lost adds `gain` tenths of `share`, up to `most` times `share`. A workload that did
    not drop, or was not measured on both occasions, keeps `share`: retention never lowers it.
    """
    shares: dict[str, float] = {}
    for workload in sorted({*before, *now}):
        lost = max(0.0, before[workload] - now[workload]) if workload in before and workload in now else 0.0
        shares[workload] = share * min(most, 1 + gain * lost)
    return shares


def retention(evaluations: Iterable[Evaluation], served: Sequence[int]) -> tuple[dict[str, float], dict[str, float]]:
    """(before, now): each workload's success in 0..1 at best by an earlier champion and by the present one.

    `evaluations` are oldest first, `served` the generations that served, the champion last. Compared are only
    evaluations of the very suites that the champion was measured on last, with memory as it is served.
    """
    measured = [e for e in evaluations if e.memory and e.generation in served]
    newest = {e.suite: e for e in measured if e.generation == served[-1]}
    now = {workload: share for e in newest.values() for workload, share in _by_workload(e).items()}
    before: dict[str, float] = {}
    for evaluation in measured:
        last = newest.get(evaluation.suite)
        if last is None or evaluation.suite_hash != last.suite_hash or evaluation.generation == served[-1]:
            continue
        for workload, share in _by_workload(evaluation).items():
            before[workload] = max(share, before.get(workload, 0.0))
    return before, now


def _by_workload(evaluation: Evaluation) -> dict[str, float]:
    outcomes: defaultdict[str, list[bool]] = defaultdict(list)
    for outcome in evaluation.outcomes:
        outcomes[outcome.workload].append(outcome.success)
    return {workload: sum(found) / len(found) for workload, found in outcomes.items()}
