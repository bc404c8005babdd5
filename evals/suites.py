"""Task suites: what is asked to measure a generation, frozen by content hash.

Owns the suites' shape, files and builders from reasoning-gym (Stojanovski et al., arXiv 2505.24760).
Owns no running (`evals.runner`) and no scoring (`agent.verify`): every task names its verifier.
The hand-written plain-chat control is in `evals.chat`, the oracle's corrections in `evals.oracle`.

Tasks built here have ids and times that follow from their content, so that building a suite or a
day again, after a crash or on another night, gives the very same records.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from memory.errors import ConfigError, boundary
from memory.jsonl import lines_of
from memory.records import DEFAULT_TENANT, Task, VerifierSpec, content_hash

Families = Mapping[str, dict[str, Any]]
"""Name of a reasoning-gym dataset -> its configuration."""

FROZEN_AT = datetime(2024, 1, 1, tzinfo=UTC)
"""The creation time of built tasks: a constant, so that the same task is the same record."""

CALCULATOR = "calculator"

TRAINED_FAMILIES: Families = {
    "chain_sum": {"min_terms": 3, "max_terms": 5, "min_digits": 2, "max_digits": 4},
    "products": {"min_digits": 2, "max_digits": 5},
    "gcd": {},
    "lcm": {},
    "letter_counting": {"min_words": 4, "max_words": 8},
    "simple_equations": {},
}
"""What the demo's days are made of (spike: SmolLM2-135M learns all six from 14 corrections each)."""

UNTRAINED_FAMILIES: Families = {
    "basic_arithmetic": {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 3},
    "leg_counting": {"min_animals": 2, "max_animals": 4},
    "spell_backward": {},
}
"""Never trained on: transfer shows in the first, the other two a 135M model fails before and after."""

FORM_FAMILIES: Families = {
    "count_bits": {},
    "power_function": {},
    "fraction_simplification": {"styles": ["plain"]},
    "bitwise_arithmetic": {},
    "prime_factorization": {},
    "decimal_arithmetic": {},
    "word_sorting": {"min_words": 3, "max_words": 4},
    "time_intervals": {},
}
"""Never trained on and mostly unsolvable with the calculator: only the form of the reply is judged."""


class EvalTask(BaseModel):
    """A task under the key that pairs its outcomes across generations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    task: Task


class Suite(BaseModel):
    """Tasks that never change under a name and role."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    role: Literal["held_out", "control"]
    tasks: list[EvalTask]
    from_days: bool = False
    """Made of what users asked: a task whose verifier fails at an answer is left out. In a suite that somebody wrote
    it ends the evaluation, since that is a fault of the suite."""

    @model_validator(mode="after")
    def _keys_are_unique(self) -> Suite:
        if len({t.key for t in self.tasks}) != len(self.tasks):
            raise ValueError(f"suite {self.name!r} holds a task key twice")
        return self

    @property
    def hash(self) -> str:
        """sha256 of what is asked and how it is judged; ids, times and tenants do not matter."""
        return content_hash([[t.key, t.task.content] for t in self.tasks])

    @property
    def fingerprints(self) -> frozenset[str]:
        """What was asked: these may never be trained on while the suite is held out."""
        return frozenset(t.task.fingerprint for t in self.tasks)


def reasoning_gym_suite(
    families: Families,
    per_family: int,
    seed: int,
    name: str,
    role: Literal["held_out", "control"],
    exclude: frozenset[str] = frozenset(),
) -> Suite:
    """`per_family` calculator tasks of every family; no question twice, none with a fingerprint in `exclude`.

    Raises: ConfigError for an unknown family or configuration, or one with too few different questions.
    """
    return Suite(
        name=name, role=role, tasks=list(_gym_tasks(families, per_family, seed, DEFAULT_TENANT, name, exclude))
    )


def reasoning_gym_tasks(
    families: Families,
    per_family: int,
    seed: int,
    tenant: str = DEFAULT_TENANT,
    source: str = "reasoning_gym",
    exclude: frozenset[str] = frozenset(),
) -> list[Task]:
    """A day's tasks, built like a suite's; pass the held-out suites' fingerprints as `exclude`.

    Raises: as `reasoning_gym_suite`.
    """
    return [built.task for built in _gym_tasks(families, per_family, seed, tenant, source, exclude)]


def untrained_suite(per_family: int = 8, seed: int = 70_002, exclude: frozenset[str] = frozenset()) -> Suite:
    """Control: families that are never trained on."""
    return reasoning_gym_suite(UNTRAINED_FAMILIES, per_family, seed, "untrained", "control", exclude)


def tool_validity_suite(per_family: int = 3, seed: int = 70_003, exclude: frozenset[str] = frozenset()) -> Suite:
    """Control: new questions on which only the form of the first reply counts, right or wrong.

    Verifier `action`: well-formed calls of offered tools which the tool accepts, or an answer.
    SmolLM2-135M-Instruct, constrained, does all 24: what this shows is a form that training broke.
    """
    built = _gym_tasks(FORM_FAMILIES, per_family, seed, DEFAULT_TENANT, "tool_validity", exclude)
    form = VerifierSpec(name="action")
    tasks = [
        EvalTask(key=t.key, task=frozen_task(t.task.model_copy(update={"verifier": form, "reference": None})))
        for t in built
    ]
    return Suite(name="tool_validity", role="control", tasks=tasks)


def frozen_task(task: Task) -> Task:
    """The task under an id that follows from its content, so that it is one record however often it is built."""
    digest = content_hash([task.tenant, task.source, task.content])
    return task.model_copy(update={"id": f"task_{digest[:32]}", "created_at": FROZEN_AT})


def save_suite(suite: Suite, path: Path) -> None:
    """Write a suite as JSONL: a header with its hash, then a line per task. Replaces the file in one act."""
    header: dict[str, Any] = {"suite": suite.name, "role": suite.role, "hash": suite.hash, "tasks": len(suite.tasks)}
    if suite.from_days:
        header["from_days"] = True
    lines = [json.dumps(header), *(t.model_dump_json() for t in suite.tasks)]
    with boundary(ConfigError, f"cannot write suite {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        draft.replace(path)


def load_suite(path: Path) -> Suite:
    """Read a suite and check that it still is the one that was frozen.

    Raises: ConfigError when the file is missing, a line is broken or the hash is not the content's.
    """
    if not path.is_file():
        raise ConfigError(f"there is no suite file {path}; build it or name another")
    lines = lines_of(path.read_text(encoding="utf-8"))
    number = 1
    try:
        header = json.loads(lines[0])
        name, role, frozen, count = header["suite"], header["role"], header["hash"], header["tasks"]
        tasks = []
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007 (named in the error below)
            tasks.append(EvalTask.model_validate_json(line))
        suite = Suite(name=name, role=role, tasks=tasks, from_days=header.get("from_days", False))
    except (ValidationError, ValueError, KeyError, IndexError, TypeError) as exc:
        first = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ConfigError(f"suite file {path}, line {number} is broken: {first}") from exc
    if suite.hash != frozen or len(tasks) != count:
        raise ConfigError(
            f"suite file {path} was changed after it was frozen (hash {suite.hash[:12]}, header says "
            f"{str(frozen)[:12]}): restore it, or save it under a new name"
        )
    return suite


def _gym_tasks(
    families: Families, per_family: int, seed: int, tenant: str, source: str, exclude: frozenset[str]
) -> Iterator[EvalTask]:
    seen = set(exclude)
    for family, config in families.items():
        taken = 0
        for index, entry in _entries(family, config, seed, per_family):
            task = _gym_task(family, config, seed, index, entry, tenant, source)
            if task.fingerprint in seen:
                continue
            seen.add(task.fingerprint)
            taken += 1
            yield EvalTask(key=f"{family}/{seed}/{index}", task=task)
            if taken == per_family:
                break
        if taken < per_family:
            raise ConfigError(
                f"family {family!r} has only {taken} new questions for seed {seed}, {per_family} are asked for"
            )


def _entries(family: str, config: dict[str, Any], seed: int, wanted: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Entries in their order, with enough spare ones to replace repeated and excluded questions."""
    with warnings.catch_warnings():
        # One of its dependencies compares strings with "is"; Python says so whenever it compiles it.
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    with boundary(ConfigError, f"reasoning-gym cannot make {family!r} with {config!r}"):
        dataset = reasoning_gym.create_dataset(family, size=8 * wanted + 64, seed=seed, **config)
    for index in range(8 * wanted + 64):
        with boundary(ConfigError, f"reasoning-gym cannot make question {index} of {family!r}"):
            entry = dataset[index]
        yield index, entry


def _gym_task(
    family: str, config: dict[str, Any], seed: int, index: int, entry: dict[str, Any], tenant: str, source: str
) -> Task:
    # Plain JSON, as the ledger would give it back: a task must be judged alike before and after storage.
    plain = json.loads(json.dumps({k: entry[k] for k in ("question", "answer", "metadata")}, default=str))
    args = {"family": family, "config": dict(config), "seed": seed, "index": index, "entry": plain}
    return frozen_task(
        Task(
            tenant=tenant,
            workload=family,
            messages=[{"role": "user", "content": " ".join(str(entry["question"]).split())}],
            tools=[CALCULATOR],
            reference=str(entry["answer"]),
            verifier=VerifierSpec(name="reasoning_gym", args=args),
            source=source,
        )
    )
