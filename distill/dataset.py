"""The dataset of a night: examples in the prompt as it is served, and their files.

Owns what enters (held-out tasks kept out, duplicates, caps) and how memory is shown in the examples;
the same snapshot gives the same bytes. Owns no recipe and no training.

Memory and weights must learn each other (spike.md): 24 corrected tasks, each once with one retrieved
success before it and once without, gave 97% held out with a retrieved success and 44% without; an
adapter trained without memory got worse with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.candidates import candidates_of, usable
from distill.layout import Compose, Layout
from distill.near import clusters
from distill.snapshot import Snapshot
from distill.train.served import FILE as SERVED
from distill.train.served import Served, served_turns
from memory.errors import ConflictError, NotEnoughExperienceError, TrainingError, boundary
from memory.recall import Recaller
from memory.records import (
    RECALLED,
    Example,
    ExampleKind,
    Feedback,
    FeedbackKind,
    Task,
    Trajectory,
    content_hash,
    text_of,
)

MANIFEST = "manifest.json"
FILES = {ExampleKind.SFT: "sft.jsonl", ExampleKind.DPO: "dpo.jsonl"}
UNTRAINED = "preference pairs while train.dpo_epochs is 0"


class DatasetConfig(BaseModel):
    """What may enter a dataset, and how memory is shown in it. Caps count an example and its copy
    without memory once; replay fills what the new examples leave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recalled: bool = True
    """Show what memory recalls; False is there for the ablation: so trained, a model does worse with memory."""
    repeat_without: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the tasks whose SFT examples also appear without memory: 1.0 is the spike's setting
    (half of the rows without), 0.5 leaves a third of the rows without, 0.0 none."""
    max_per_task: int = Field(default=4, ge=1)
    """Examples of one kind for one question."""
    max_per_cluster: int = Field(default=16, ge=1)
    """Examples of one kind for questions that are nearly the same."""
    max_per_author: int = Field(default=128, ge=1)
    """Examples resting on one author's feedback, or on nobody's and one asker's requests (a key's, or a user's whom a
    vouching key or the operator names), in absolute numbers: nobody can drown the others. An example that any full
    author stands behind stays out. What the operator asks in nobody's name has no such cap."""
    max_per_workload: int = Field(default=2000, ge=1)
    """Examples of one kind of one workload."""
    min_examples: int = Field(default=8, ge=1)
    """Fewer than these, before the copies without memory, are not worth a night."""
    seed: int = 0


@dataclass(frozen=True)
class Dataset:
    """The examples, in the order of the files, with what was counted on the way."""

    examples: list[Example]
    counts: dict[str, int]
    """Recipe -> its examples, copies without memory not counted."""
    dropped: dict[str, int]
    """Reason -> how many examples it kept out."""
    config: DatasetConfig
    seed: int
    """The snapshot's seed."""
    served: list[Served] = field(default_factory=list)
    """Turns as the engine saw them, by which the trainer checks its own rendering."""
    champion: int | None = None
    memory_watermark: str = ""
    recipes: list[str] = field(default_factory=list)
    upto: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    """Runs that teach nothing tonight only because a cap was reached."""


class DatasetFile(BaseModel):
    """One file of a dataset: how many rows, and the sha256 (hex) of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    sha256: str


class Manifest(BaseModel):
    """What a dataset folder holds. Written last: a folder without it is not a dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    files: dict[str, DatasetFile]
    served: DatasetFile | None = None
    """Not trained on: turns as they were served. None where the engine gave no token ids."""
    counts: dict[str, int]
    dropped: dict[str, int]
    with_memory: int
    """Rows that show a recalled block."""
    sources: list[str]
    """Ids of the trajectories and feedback that the examples rest on."""
    config: DatasetConfig
    seed: int
    champion: int | None = None
    """The generation that the night goes on from."""
    memory_watermark: str = ""
    """What memory held when the recalled blocks were asked for; as of an evaluation."""
    recipes: list[str] = Field(default_factory=list)
    """Those that were asked, in their order; none over an uploaded file."""
    upto: dict[str, int] = Field(default_factory=dict)
    """The night's line, by kind of record its last seq in the ledger: nothing behind it was looked at."""
    left: list[str] = []
    """Ids of the runs that only a cap kept out: they are still to be learned."""


def build(
    snapshot: Snapshot,
    recipe_names: Iterable[str],
    recaller: Recaller,
    compose: Compose,
    config: DatasetConfig | None = None,
    *,
    pairs: bool = True,
) -> Dataset:
    """Run the recipes over the snapshot and lay every example out as it would be served.

    An SFT example shows what memory would recall for its task now, the task's own run excepted, and for
    `repeat_without` of the tasks a second time nothing; a DPO example is shown as served, once.
    When two examples teach the same, the first recipe's stays. `pairs`: whether the trainer does DPO; what it would not
    read is left out, so that it neither counts nor fills a cap. Raises ConfigError for an unknown recipe
    and NotEnoughExperienceError below `min_examples`.
    """
    dropped, names = Counter[str](), list(recipe_names)
    candidates = candidates_of(snapshot, names, dropped)
    if not pairs:
        untrained = sum(e.kind is ExampleKind.DPO for e in candidates)
        candidates = [e for e in candidates if e.kind is not ExampleKind.DPO]
        dropped.update({UNTRAINED: untrained} if untrained else {})
    dataset = _laid_out(snapshot, candidates, dropped, recaller, compose, config or DatasetConfig())
    return replace(dataset, recipes=names)


def build_uploaded(
    snapshot: Snapshot,
    examples: Iterable[Example],
    recaller: Recaller,
    compose: Compose,
    config: DatasetConfig | None = None,
) -> Dataset:
    """`build` over given examples (an uploaded file's) instead of recipes; `snapshot.tasks` holds their tasks."""
    dropped: Counter[str] = Counter()
    candidates = usable(snapshot, examples, dropped)
    return _laid_out(snapshot, candidates, dropped, recaller, compose, config or DatasetConfig())


def _laid_out(
    snapshot: Snapshot,
    candidates: list[Example],
    dropped: Counter[str],
    recaller: Recaller,
    compose: Compose,
    config: DatasetConfig,
) -> Dataset:
    chosen, left = _capped(snapshot, config, candidates, dropped)
    if len(chosen) < config.min_examples:
        raise NotEnoughExperienceError(
            f"{too_few(len(chosen), config.min_examples, dropped)}: "
            "run more tasks, add corrections or lower min_examples"
        )
    layout = Layout(recaller, compose)
    laid_out: dict[str, Example] = {}
    for example in chosen:
        task = snapshot.tasks[example.task_id]
        unseen = example.bare or not config.recalled
        served = layout.bare(example, task) if unseen else layout.served(example, task)
        laid_out.setdefault(served.id, served)
        repeated = _fraction(snapshot, config, task.fingerprint) < config.repeat_without
        if repeated and served.with_memory and served.kind is ExampleKind.SFT:
            bare = layout.bare(example, task)
            laid_out.setdefault(bare.id, bare)
    # Mixed, so that an example and its copy without memory do not share a batch by rule.
    shuffled = sorted(laid_out.values(), key=lambda e: (e.kind, _digest(snapshot, config, e.id)))
    return Dataset(
        examples=shuffled,
        counts=dict(sorted(Counter(e.recipe for e in chosen).items())),
        dropped=dict(sorted(dropped.items())),
        config=config,
        seed=snapshot.seed,
        served=served_of(snapshot),
        left=left,
    )


def too_few(count: int, needed: int, dropped: Mapping[str, int]) -> str:
    """That a night has too few examples, and what was left out."""
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none left out"
    return f"only {count} examples to learn from, {needed} needed ({why})"


def served_of(snapshot: Snapshot) -> list[Served]:
    """How the newest runs were served, those of held-out tasks left out."""

    def may_enter(run: Trajectory) -> bool:
        task = snapshot.tasks.get(run.task_id)
        return task is not None and snapshot.held_out_reason(task) is None

    return served_turns(snapshot.trajectories, may_enter)


def write(dataset: Dataset, folder: Path) -> Manifest:
    """Write sft.jsonl, dpo.jsonl, served.jsonl and, last, manifest.json into a new folder, all at once by a rename.

    Writing the same dataset again is a no-op. Raises ConflictError when the folder holds anything else,
    TrainingError when the disk refuses.
    """
    rows = {name: [e for e in dataset.examples if e.kind is kind] for kind, name in FILES.items()}
    contents = {name: "".join(map(_line, examples)).encode() for name, examples in rows.items()}
    served = "".join(map(_line, dataset.served)).encode()
    manifest = Manifest(
        files={name: _file(rows[name], content) for name, content in contents.items()},
        served=_file(dataset.served, served) if served else None,
        counts=dataset.counts,
        dropped=dataset.dropped,
        with_memory=sum(e.with_memory for e in dataset.examples),
        sources=sorted({source for e in dataset.examples for source in e.sources}),
        config=dataset.config,
        seed=dataset.seed,
        champion=dataset.champion,
        memory_watermark=dataset.memory_watermark,
        recipes=dataset.recipes,
        upto=dataset.upto,
        left=dataset.left,
    )
    with boundary(TrainingError, f"cannot write the dataset {folder}; check the disk and its permissions"):
        if folder.exists() and any(folder.iterdir()):
            if read_manifest(folder) == manifest:
                return manifest
            raise ConflictError(f"{folder} already holds something else; write the dataset to another folder")
        contents |= {SERVED: served} if served else {}
        contents[MANIFEST] = (manifest.model_dump_json(indent=2) + "\n").encode()
        _publish(contents, folder)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a whole and undamaged dataset folder; None for anything else."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        for name, file in {**manifest.files, **({SERVED: manifest.served} if manifest.served else {})}.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != file.sha256:
                return None
    except (OSError, ValidationError):
        return None
    return manifest


class Caps:
    """How far the caps are filled. An example and its copy without memory count once."""

    def __init__(self, config: DatasetConfig, tasks: Mapping[str, Task], feedback: Iterable[Feedback]) -> None:
        """`tasks`: those of all examples that will be asked about; `feedback` names who stands behind them."""
        self._config = config
        self._tasks = tasks
        self._words = {f.id: f for f in feedback}
        self._said = {id: _asked(task) for id, task in tasks.items()}
        self._leaders = clusters(self._said.values())
        self._counted: Counter[tuple[str, ...]] = Counter()
        self._laid_out: Counter[tuple[str, bool]] = Counter()

    def reached(self, example: Example) -> str | None:
        """The first cap that leaves no room for an example, by the setting's name."""
        for name, keys in self._keys(example).items():
            if any(self._counted[key] >= getattr(self._config, name) for key in keys):
                return name
        return None

    def count(self, example: Example) -> None:
        """Let an example fill its caps."""
        self._counted.update(key for keys in self._keys(example).values() for key in keys)

    def holds(self, example: Example) -> None:
        """Count an example as it was laid out, if it is not the other copy of one that was counted."""
        if not self._is_copy(example):
            self.count(example)
        self._laid_out[_lesson(example), example.with_memory] += 1

    def takes(self, example: Example) -> bool:
        """Whether there is room for an example as it was laid out; if so it is counted."""
        if not self._is_copy(example) and self.reached(example) is not None:
            return False
        self.holds(example)
        return True

    def _is_copy(self, example: Example) -> bool:
        lesson, seen = _lesson(example), example.with_memory
        return self._laid_out[lesson, seen] < self._laid_out[lesson, not seen]

    def _keys(self, example: Example) -> dict[str, list[tuple[str, ...]]]:
        """Each cap's setting and whose room the example takes."""
        task = self._tasks[example.task_id]
        of = (example.kind.value, example.tenant)
        return {
            "max_per_task": [("task", *of, task.fingerprint)],
            "max_per_cluster": [("cluster", *of, self._leaders[self._said[example.task_id]])],
            "max_per_author": [("author", *author) for author in self._authors(example, task)],
            "max_per_workload": [("workload", *of, example.workload)],
        }

    def _authors(self, example: Example, task: Task) -> set[tuple[str, str]]:
        """Who stands behind an example: whose words made it, else who asked; besides, whose hints helped."""
        words = [self._words[source] for source in example.sources if source in self._words]
        hinting = {(f.tenant, f.voice) for f in words if f.kind is FeedbackKind.HINT}
        vouching = {(f.tenant, f.voice) for f in words if f.kind is not FeedbackKind.HINT}
        return hinting | (vouching or _asker(task))


def _capped(
    snapshot: Snapshot, config: DatasetConfig, candidates: list[Example], dropped: Counter[str]
) -> tuple[list[Example], list[str]]:
    """(the candidates under all caps, the runs that only a cap kept out). Every question's first example goes before
    anyone's second, in an order of questions that only the seed decides: a cap thins the data evenly.

    What is over a question's own cap is not kept for later: the question was taught.
    """
    of_task: Counter[tuple[str, str, str]] = Counter()
    ranked: list[tuple[int, str, int, Example]] = []
    for position, example in enumerate(candidates):
        fingerprint = snapshot.tasks[example.task_id].fingerprint
        question = (example.kind.value, example.tenant, fingerprint)
        ranked.append((of_task[question], _digest(snapshot, config, *question), position, example))
        of_task[question] += 1
    caps = Caps(config, {e.task_id: snapshot.tasks[e.task_id] for e in candidates}, snapshot.feedback)
    chosen: list[Example] = []
    over: list[Example] = []
    for rank, _, _, example in sorted(ranked, key=lambda entry: entry[:3]):
        reached = "max_per_task" if rank >= config.max_per_task else caps.reached(example)
        if reached is not None:
            dropped[f"over {reached}"] += 1
            over += [example] if reached != "max_per_task" else []
        else:
            caps.count(example)
            chosen.append(example)
    taught = {source for example in chosen for source in example.sources}
    runs = {t.id for t in (*snapshot.trajectories, *snapshot.begun, *snapshot.taught)} - taught
    return chosen, [id for id in dict.fromkeys(id for example in over for id in example.sources) if id in runs]


def _lesson(example: Example) -> str:
    """Hash of what an example and its copy without memory have in common."""
    taught = [m for m in example.messages if m.get("name") != RECALLED and m.get("role") != "system"]
    of = [example.kind, example.tenant, example.recipe, example.task_id, *example.sources]
    return content_hash([of, taught, example.chosen, example.rejected])


def _asker(task: Task) -> set[tuple[str, str]]:
    """Who asked, for what rests on nobody's feedback: the reference that judged it came with the request. Nobody for
    the operator's own, and where there are no keys and no user is named."""
    return {(task.tenant, task.voice)} if task.voice else set()


def _asked(task: Task) -> str:
    """The user's words; what an application puts before all of them makes no two questions alike."""
    return "\n".join(text_of(m) for m in task.messages if m.get("role") == "user")


def _digest(snapshot: Snapshot, config: DatasetConfig, *parts: str) -> str:
    return content_hash([snapshot.seed, config.seed, *parts])


def _fraction(snapshot: Snapshot, config: DatasetConfig, fingerprint: str) -> float:
    """A number in 0..1 that only the seeds and the question decide."""
    return int(_digest(snapshot, config, "repeat", fingerprint)[:8], 16) / 0x1_0000_0000


def _file(rows: Sequence[BaseModel], content: bytes) -> DatasetFile:
    return DatasetFile(rows=len(rows), sha256=hashlib.sha256(content).hexdigest())


def _line(row: BaseModel) -> str:
    # ASCII: a line separator of Unicode inside a text must not end the row.
    return json.dumps(row.model_dump(mode="json"), sort_keys=True, separators=(",", ":")) + "\n"


def _publish(contents: dict[str, bytes], folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in contents.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
