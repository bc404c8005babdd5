"""Replay: earlier nights' examples again, so that a night does not unlearn the ones before it.

Replay scheduling (Klasson et al., arXiv 2209.08660): which old tasks to replay when matters while there is
room for few. A fixed share is the plain form; `replay_shares` raises it where retention dropped. Which
examples follows from their hash, the seed and the champion, so the same snapshot gives the same dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from memory.night_records import Evaluation, TaskOutcome
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


def retention(
    evaluations: Iterable[Evaluation], served: Sequence[int], *, fewest: int = 12
) -> tuple[dict[str, float], dict[str, float]]:
    """(before, now): each workload's success in 0..1 by an earlier champion and by the present one. Of several the one
    since which most tasks were lost.

    `evaluations` are oldest first, `served` the generations that served, the champion last. Compared are, with memory
    as it is served, the tasks that an evaluation shares with the champion's last one of the suite: all while the suite
    is the same, at least `fewest` of a workload where it has changed. A workload without such tasks is in `now` only.
    """
    measured = [e for e in evaluations if e.memory and e.generation in served]
    newest = {e.suite: e for e in measured if e.generation == served[-1]}
    now = {w: _share([o for o in e.outcomes if o.workload == w]) for e in newest.values() for w in _workloads(e)}
    lost: dict[str, int] = {}
    before: dict[str, float] = {}
    for evaluation in measured:
        last = newest.get(evaluation.suite)
        if last is None or evaluation.generation == served[-1]:
            continue
        common = evaluation.common(last)
        for workload in sorted(_workloads(last)):
            part = [pair for pair in common if pair[1].workload == workload]
            fall = sum(a.success - b.success for a, b in part)
            enough = len(part) >= (1 if evaluation.suite_hash == last.suite_hash else fewest)
            if enough and (workload not in lost or fall > lost[workload]):
                lost[workload] = fall
                before[workload], now[workload] = _share([a for a, _ in part]), _share([b for _, b in part])
    return before, now


def _workloads(evaluation: Evaluation) -> set[str]:
    return {outcome.workload for outcome in evaluation.outcomes}


def _share(outcomes: Sequence[TaskOutcome]) -> float:
    return sum(o.success for o in outcomes) / len(outcomes)
