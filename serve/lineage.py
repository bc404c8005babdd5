"""Where a reply came from, and what came of it.

Back: reply -> generation -> night -> dataset -> its examples -> the runs and words they were made from, parent by
parent.
Forth: the examples that were made from a run or a user's word, their nights, and the generations that learned.
Counts are of whole nights; everything else is of one tenant.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel
from rich.markup import escape
from rich.tree import Tree

from distill.dataset import MANIFEST
from memory.ledger import Ledger
from memory.lineage import examples_naming, feedback_by_id, get_feedback
from memory.night_records import Generation, GenerationStatus, NightStatus
from memory.records import Example, ExampleKind, Feedback, FeedbackKind, Trajectory, Trust
from memory.responses import get_response


class Word(BaseModel):
    """A user's word on a run."""

    id: str
    kind: FeedbackKind
    author: str
    trust: Trust
    trust_reason: str


class Source(BaseModel):
    """A training example and what it was made from."""

    id: str
    recipe: str
    kind: ExampleKind
    task_id: str
    trajectories: list[str]
    feedback: list[Word]


class DatasetPart(BaseModel):
    """A file that a night trained on."""

    name: str
    rows: int
    sha256: str


class Built(BaseModel):
    """A night's dataset on disk, of all tenants."""

    manifest: str
    """Its path under the data folder."""
    files: list[DatasetPart]


class Ancestor(BaseModel):
    """A generation that the reply descends from, and what it learned from."""

    generation: int
    served_by: str
    status: GenerationStatus
    night: str | None
    night_status: NightStatus | None
    recipes: dict[str, int]
    """Rows that its night trained on, by recipe, of all tenants."""
    dataset: Built | None = None
    """None for a generation without a night, and for a night that came to no dataset."""
    examples: list[Source]
    """The first of this tenant's."""
    more: int
    """This tenant's examples that are not listed."""


class Taught(BaseModel):
    """A night that learned from the run or the word."""

    night: str
    status: NightStatus
    generation: int | None
    generation_status: GenerationStatus | None
    descendants: list[int]
    """Generations that were trained on from it."""
    dataset: Built | None = None
    examples: list[Source]


class Reply(BaseModel):
    """The run itself."""

    id: str
    task_id: str
    workload: str
    generation: int
    served_by: str
    started_at: datetime
    score: float | None
    recalled: list[str]
    """Memory items that it was shown."""


class Lineage(BaseModel):
    """Everything that is known of where a run came from and where it went."""

    object: Literal["lineage"] = "lineage"
    id: str
    trajectory: Reply
    feedback: list[Word]
    learned_from: list[Ancestor]
    """The generation that answered, then its parents down to the base model."""
    taught: list[Taught]


def trace(ledger: Ledger, record_id: str, *, tenant: str, limit: int = 20) -> Lineage:
    """The lineage of a reply (`chatcmpl-…`, `resp_…`), a run (`traj_…`) or feedback (`fb_…`).

    For feedback, `feedback` and `taught` are of that word alone. `limit`: examples listed for each ancestor.
    Raises `NotFoundError` for an unknown id and for another tenant's.
    """
    database = ledger.database
    if record_id.startswith("fb_"):
        said = [get_feedback(database, record_id, tenant=tenant)]
        run = ledger.get_trajectory(said[0].trajectory_id, tenant=tenant)
        names = [record_id]
    else:
        if record_id.startswith("resp_"):
            run_id = get_response(database, record_id, tenant=tenant).trajectory_id
        else:
            run_id = record_id.removeprefix("chatcmpl-")
        run = ledger.get_trajectory(run_id, tenant=tenant)
        said = ledger.feedback(trajectory_id=run.id, tenant=tenant)
        names = [run.id, *(f.id for f in said)]
    generations = {g.number: g for g in ledger.generations()}
    return Lineage(
        id=record_id,
        trajectory=_reply(run),
        feedback=[_word(f) for f in said],
        learned_from=[_ancestor(ledger, g, tenant, limit) for g in _line(generations, run.generation)],
        taught=_taught(ledger, generations, names, tenant),
    )


def tree_of(lineage: Lineage) -> Tree:
    """The lineage for a terminal."""
    run = lineage.trajectory
    score = "not judged" if run.score is None else f"score {run.score:g}"
    root = Tree(f"[bold]{escape(run.id)}[/bold]  {escape(run.workload)}, {score}, by {escape(run.served_by)}")
    if run.recalled:
        root.add(f"shown from memory: {escape(', '.join(run.recalled))}")
    said = root.add("said of it" if lineage.feedback else "nothing was said of it")
    for word in lineage.feedback:
        said.add(_told(word))
    back = root.add("it came from")
    for ancestor in lineage.learned_from:
        back = back.add(f"[bold]generation {ancestor.generation}[/bold] ({ancestor.status}, {ancestor.served_by})")
        if ancestor.night is not None:
            counts = ", ".join(f"{count} {escape(recipe)}" for recipe, count in ancestor.recipes.items())
            night = back.add(f"{ancestor.night} ({ancestor.night_status}): {counts or 'no examples kept'}")
            shelf = _add_dataset(night, ancestor.dataset)
            _add_examples(shelf, ancestor.examples)
            if ancestor.more:
                shelf.add(f"and {ancestor.more} more")
    forth = root.add("it taught" if lineage.taught else "no night has learned from it")
    for taught in lineage.taught:
        made = "no generation" if taught.generation is None else f"generation {taught.generation}"
        standing = f" ({taught.generation_status})" if taught.generation_status else ""
        later = f", and through it {', '.join(map(str, taught.descendants))}" if taught.descendants else ""
        night = forth.add(f"{taught.night} ({taught.status}): {made}{standing}{later}")
        _add_examples(_add_dataset(night, taught.dataset), taught.examples)
    return root


def _add_dataset(night: Tree, dataset: Built | None) -> Tree:
    """The dataset's branch, under which its examples go; the night's own where there is none."""
    if dataset is None:
        return night
    branch = night.add(f"dataset {escape(dataset.manifest)}")
    for file in dataset.files:
        branch.add(f"{escape(file.name)}  {file.rows} rows, sha256 {file.sha256}")
    return branch


def _add_examples(branch: Tree, examples: list[Source]) -> None:
    for example in examples:
        leaf = branch.add(f"{example.id}  {escape(example.recipe)} ({example.kind}), task {escape(example.task_id)}")
        for run_id in example.trajectories:
            leaf.add(escape(run_id))
        for word in example.feedback:
            leaf.add(_told(word))


def _told(word: Word) -> str:
    return f"{word.id}  {word.kind} by {escape(word.author)}: {word.trust} ({escape(word.trust_reason)})"


def _reply(run: Trajectory) -> Reply:
    return Reply(
        id=run.id,
        task_id=run.task_id,
        workload=run.workload,
        generation=run.generation,
        served_by=run.model,
        started_at=run.started_at,
        score=run.outcome.score if run.outcome else None,
        recalled=[item.id for item in run.recalled],
    )


def _word(said: Feedback) -> Word:
    return Word(id=said.id, kind=said.kind, author=said.author, trust=said.trust, trust_reason=said.trust_reason)


def _line(generations: dict[int, Generation], number: int) -> list[Generation]:
    """The generation and its parents, as far as the ledger knows them."""
    line: list[Generation] = []
    at: int | None = number
    while at is not None and (generation := generations.get(at)) is not None and generation not in line:
        line.append(generation)
        at = generation.parent
    return line


def _ancestor(ledger: Ledger, generation: Generation, tenant: str, limit: int) -> Ancestor:
    night = ledger.night(generation.night_id) if generation.night_id else None
    everything = ledger.examples(night.id) if night else []
    mine = [e for e in everything if e.tenant == tenant]
    # Rehearsed and uploaded rows have nobody behind them: those that lead further come first.
    mine.sort(key=lambda e: not e.sources)
    return Ancestor(
        generation=generation.number,
        served_by=generation.served_name,
        status=generation.status,
        night=night.id if night else None,
        night_status=night.status if night else None,
        recipes=dict(sorted(Counter(e.recipe for e in everything).items())),
        dataset=_built(ledger, night.id) if night else None,
        examples=_sources(ledger, mine[:limit], tenant),
        more=len(mine[limit:]),
    )


def _taught(ledger: Ledger, generations: dict[int, Generation], names: list[str], tenant: str) -> list[Taught]:
    by_night: dict[str, list[Example]] = {}
    for night_id, example in examples_naming(ledger.database, names, tenant=tenant):
        by_night.setdefault(night_id, []).append(example)
    taught: list[Taught] = []
    for night_id, examples in by_night.items():
        night = ledger.night(night_id)
        made = generations.get(night.candidate) if night.candidate is not None else None
        later = [n for n in sorted(generations) if made in _line(generations, n)[1:]] if made else []
        taught.append(
            Taught(
                night=night.id,
                status=night.status,
                generation=night.candidate,
                generation_status=made.status if made else None,
                descendants=later,
                dataset=_built(ledger, night.id),
                examples=_sources(ledger, examples, tenant),
            )
        )
    return taught


def _built(ledger: Ledger, night_id: str) -> Built | None:
    stage = ledger.stage(night_id, "dataset")
    if stage is None or "files" not in stage.output:
        return None
    # The data folder may have moved since, and where it lies is the operator's affair.
    inside = Path(*Path(stage.output["folder"]).parts[-3:])
    parts = [DatasetPart(name=name, **file) for name, file in sorted(stage.output["files"].items())]
    return Built(manifest=str(inside / MANIFEST), files=parts)


def _sources(ledger: Ledger, examples: list[Example], tenant: str) -> list[Source]:
    words = feedback_by_id(ledger.database, (id for e in examples for id in e.sources), tenant=tenant)
    return [
        Source(
            id=e.id,
            recipe=e.recipe,
            kind=e.kind,
            task_id=e.task_id,
            trajectories=[id for id in e.sources if id not in words],
            feedback=[_word(words[id]) for id in e.sources if id in words],
        )
        for e in examples
    ]
