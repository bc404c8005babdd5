"""Verifiers: named judges of an answer. A task says which one judges it.

Built in: `exact`, `numeric`, `regex`, `contains`, `reasoning_gym`, `action`. An operator adds others by
the entry point group `nightschool.verifiers`; a task can only name a verifier, never bring code along.
A verifier returns a score in 0..1, where only full
marks count as success.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from memory.errors import VerifierError, boundary
from memory.records import Outcome, OutcomeSource, StopReason, Task, Trajectory

Verifier = Callable[[Task, str, dict[str, Any]], float]
"""(task, answer, the spec's arguments) -> score in 0..1."""


def verify(task: Task, answer: str | None) -> Outcome | None:
    """Judge an answer by the task's verifier; None when the task has none.

    No answer scores 0. A task with a reference and no verifier is judged by `exact`.
    Raises VerifierError for an unknown verifier or one that failed.
    """
    spec = task.verifier
    name = spec.name if spec else ("exact" if task.reference is not None else None)
    if name is None:
        return None
    if answer is None:
        return Outcome(score=0.0, by=OutcomeSource.VERIFIER, detail=f"{name}: no answer")
    judge = _find(name)
    with boundary(VerifierError, f"verifier {name!r}"):
        score = float(judge(task, answer, spec.args if spec else {}))
    return Outcome(score=min(1.0, max(0.0, score)), by=OutcomeSource.VERIFIER, detail=name)


def check_verifier(task: Task) -> None:
    """VerifierError, before anything runs, when the task names a verifier there is not, or gives one that compares
    texts too little to judge by (no reference, a pattern that is none)."""
    if task.verifier is None:
        return
    judge = _find(task.verifier.name)
    if task.verifier.name in _COMPARING:
        with boundary(VerifierError, f"verifier {task.verifier.name!r}"):
            judge(task, "0", task.verifier.args)


def judge_trajectory(task: Task, trajectory: Trajectory) -> Outcome | None:
    """As `verify`, for a whole run: `action` looks at how it acted, the others at its answer."""
    if task.verifier is not None and task.verifier.name == "action":
        # Readable actions up to an answer: neither lines that cannot be read nor turns without an end.
        acted = trajectory.stop_reason is StopReason.ANSWER
        return Outcome(score=float(acted), by=OutcomeSource.VERIFIER, detail="action")
    return verify(task, trajectory.answer)


def _reference(task: Task) -> str:
    if task.reference is None:
        raise VerifierError("this verifier needs the task to carry a reference answer")
    return task.reference


def _exact(task: Task, answer: str, args: dict[str, Any]) -> float:
    """Equal up to white space and, unless `case_sensitive`, case."""
    expected, got = " ".join(_reference(task).split()), " ".join(answer.split())
    if not args.get("case_sensitive", False):
        expected, got = expected.casefold(), got.casefold()
    return float(expected == got)


def _numeric(task: Task, answer: str, args: dict[str, Any]) -> float:
    """The last number in the answer equals the reference within `tolerance` (relative, default 1e-6)."""
    got = re.findall(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", answer)
    if not got:
        return 0.0
    expected = float(_reference(task).replace(",", ""))
    tolerance = float(args.get("tolerance", 1e-6))
    return float(math.isclose(float(got[-1].replace(",", "")), expected, rel_tol=tolerance, abs_tol=tolerance))


def _regex(task: Task, answer: str, args: dict[str, Any]) -> float:
    """The whole answer matches `pattern` (or the reference as a pattern).

    Patterns come from users: the `regex` package stops one that backtracks for ever.
    """
    import regex

    pattern = args.get("pattern") or _reference(task)
    return float(regex.fullmatch(pattern, answer.strip(), regex.DOTALL, timeout=1.0) is not None)


def _contains(_task: Task, answer: str, args: dict[str, Any]) -> float:
    """Has one of `any` (if given), none of `none`, and at least `min_words` words; case-insensitive."""
    text = answer.casefold()
    some = args.get("any") or []
    ok = (not some or any(word.casefold() in text for word in some)) and not any(
        word.casefold() in text for word in args.get("none") or []
    )
    return float(ok and len(text.split()) >= int(args.get("min_words", 1)))


def _reasoning_gym(_task: Task, answer: str, args: dict[str, Any]) -> float:
    """reasoning-gym's own scorer of the family that made the task (`family`, `entry`)."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(args["family"], size=1, seed=0, **args.get("config", {}))
    entry = args["entry"]
    return float(dataset.score_answer(answer, json.loads(entry) if isinstance(entry, str) else entry))


VERIFIERS: dict[str, Verifier] = {
    "exact": _exact,
    "numeric": _numeric,
    "regex": _regex,
    "contains": _contains,
    "reasoning_gym": _reasoning_gym,
    "action": lambda _task, _answer, _args: 1.0,
}


_COMPARING = frozenset({"exact", "numeric", "regex", "contains"})
"""Cheap and without effects: can be tried on any answer."""


def _find(name: str) -> Verifier:
    if name in VERIFIERS:
        return VERIFIERS[name]
    from importlib.metadata import entry_points

    found = [ep for ep in entry_points(group="nightschool.verifiers") if ep.name == name]
    if not found:
        raise VerifierError(f"unknown verifier {name!r}; known: {', '.join(sorted(VERIFIERS))}")
    with boundary(VerifierError, f"verifier {name!r} cannot be loaded"):
        return found[0].load()
