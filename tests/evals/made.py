"""Small evaluations for the tests of this room."""

from __future__ import annotations

from typing import Any, Literal

from memory.night_records import Evaluation, TaskOutcome


def evaluation(
    successes: list[bool],
    *,
    suite: str = "held",
    role: Literal["held_out", "control"] = "held_out",
    generation: int = 0,
    workloads: tuple[str, ...] = ("sums", "gcd"),
    **other: Any,
) -> Evaluation:
    """One outcome per entry, its workload in turn from `workloads`."""
    outcomes = [
        TaskOutcome(key=f"{suite}/{i}", workload=workloads[i % len(workloads)], score=float(ok))
        for i, ok in enumerate(successes)
    ]
    fields: dict[str, Any] = {"suite_hash": f"hash of {suite}", "memory": False, "seconds": 1.0, **other}
    return Evaluation(suite=suite, role=role, generation=generation, outcomes=outcomes, **fields)


def first(successes: int, n: int) -> list[bool]:
    """The first `successes` of `n` tasks done."""
    return [i < successes for i in range(n)]


def held_out(champion: list[bool], candidate: list[bool]) -> tuple[Evaluation, Evaluation]:
    """The same held-out suite by both."""
    return evaluation(champion, generation=1), evaluation(candidate, generation=2)


def control(champion: list[bool], candidate: list[bool], suite: str = "chat") -> tuple[Evaluation, Evaluation]:
    """The same control suite by both."""
    one = evaluation(champion, suite=suite, role="control", generation=1, workloads=(suite,))
    two = evaluation(candidate, suite=suite, role="control", generation=2, workloads=(suite,))
    return one, two
