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
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

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
    """VerifierError, before anything runs, when the task names a verifier there is not, or gives a built-in one what
    it cannot judge by: arguments of the wrong kind, no reference, a pattern that is none."""
    if task.verifier is None:
        return
    name, args = task.verifier.name, task.verifier.args
    judge = _find(name)
    if name in _COMPARING:
        with boundary(VerifierError, f"verifier {name!r}"):
            judge(task, "0", args)
    elif name == "reasoning_gym":
        _given(_Gym, name, args)


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


class _Args(BaseModel):
    """What a verifier takes. Read whole before the answer is looked at: arguments that fail at some answers only would
    be found out in the exam."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Exact(_Args):
    case_sensitive: bool = False


class _Numeric(_Args):
    tolerance: float = Field(default=1e-6, ge=0, allow_inf_nan=False)


class _Regex(_Args):
    pattern: str = ""


class _Contains(_Args):
    any: list[str] = []
    none: list[str] = []
    min_words: int = 1


def _entry(given: Any) -> Any:
    try:
        entry = json.loads(given) if isinstance(given, str) else given
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if isinstance(entry, dict) and "answer" not in entry:
        raise ValueError("an entry of reasoning-gym has an answer")
    return entry


class _Gym(_Args):
    family: str
    config: dict[str, Any] = {}
    entry: Annotated[dict[str, Any], BeforeValidator(_entry)]


ArgsT = TypeVar("ArgsT", bound=_Args)


def _given(kind: type[ArgsT], verifier: str, args: dict[str, Any]) -> ArgsT:
    """The arguments, null being one that was not given. VerifierError names the first wrong one, without its value."""
    try:
        return kind.model_validate({name: value for name, value in args.items() if value is not None})
    except ValidationError as exc:
        wrong = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in wrong["loc"])
        raise VerifierError(f"verifier {verifier!r}: argument {place}: {wrong['msg']}") from exc


def _exact(task: Task, answer: str, args: dict[str, Any]) -> float:
    """Equal up to white space and, unless `case_sensitive`, case."""
    given = _given(_Exact, "exact", args)
    expected, got = " ".join(_reference(task).split()), " ".join(answer.split())
    if not given.case_sensitive:
        expected, got = expected.casefold(), got.casefold()
    return float(expected == got)


def _numeric(task: Task, answer: str, args: dict[str, Any]) -> float:
    """The last number in the answer equals the reference within `tolerance` (relative, default 1e-6)."""
    tolerance = _given(_Numeric, "numeric", args).tolerance
    expected = float(_reference(task).replace(",", ""))
    got = re.findall(r"-?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", answer)
    if not got:
        return 0.0
    return float(math.isclose(float(got[-1].replace(",", "")), expected, rel_tol=tolerance, abs_tol=tolerance))


def _regex(task: Task, answer: str, args: dict[str, Any]) -> float:
    """The whole answer matches `pattern` (or the reference as a pattern).

    Patterns come from users: the `regex` package stops one that backtracks for ever.
    """
    import regex

    pattern = _given(_Regex, "regex", args).pattern or _reference(task)
    return float(regex.fullmatch(pattern, answer.strip(), regex.DOTALL, timeout=1.0) is not None)


def _contains(_task: Task, answer: str, args: dict[str, Any]) -> float:
    """Has one of `any` (if given), none of `none`, and at least `min_words` words; case-insensitive."""
    given, text = _given(_Contains, "contains", args), answer.casefold()
    ok = (not given.any or any(word.casefold() in text for word in given.any)) and not any(
        word.casefold() in text for word in given.none
    )
    return float(ok and len(text.split()) >= given.min_words)


def _reasoning_gym(_task: Task, answer: str, args: dict[str, Any]) -> float:
    """reasoning-gym's own scorer of the family that made the task (`family`, `entry`)."""
    import reasoning_gym

    given = _given(_Gym, "reasoning_gym", args)
    dataset = reasoning_gym.create_dataset(given.family, size=1, seed=0, **given.config)
    return float(dataset.score_answer(answer, given.entry))


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
