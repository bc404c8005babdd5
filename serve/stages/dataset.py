"""The dataset stage: recipes, uploads, replay and rehearsal, laid out as they would be served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.llm import ChatRequest
from agent.prompts import compose
from distill.dataset import Caps, Dataset, DatasetConfig, build, build_uploaded, read_manifest, served_of, write
from distill.rehearsal import ANSWER_TOKENS, RECIPE, Answer, rehearse
from distill.replay import replay, replay_shares, retention
from distill.snapshot import Snapshot
from distill.uploads import RECIPE as UPLOADED
from distill.uploads import read_upload
from memory import files, runs
from memory.errors import LedgerError, NotEnoughExperienceError, boundary
from memory.night_records import NightStatus
from memory.records import Example, ExampleKind, Message, Task, Trust, content_hash
from serve import promotion
from serve.escalation import recipes_with_teacher
from serve.stages.material import MOST_LEFT, load_snapshot
from serve.stages.night_run import NightRun, Output, starts_from
from serve.stages.practice import PRACTICE
from serve.stages.training import train_config
from serve.stages.worth import nothing_new
from serve.wiring import Services, keep_task

REHEARSED = {"temperature": 0.0, "max_tokens": ANSWER_TOKENS}
"""How the base model is asked."""


def make_dataset(run: NightRun) -> Output:
    """Recipes over the snapshot, every example laid out as it would be served, replay beside the new ones."""
    services, settings, snap = run.services, run.services.settings, load_snapshot(run)
    folder = run.folder / "dataset"
    if (manifest := read_manifest(folder)) is None:
        memory = services.ledger.memory_watermark()
        config = settings.dataset.model_copy(update={"min_examples": settings.night.min_examples})
        if "training_file" in run.night.options:
            dataset = _uploaded(run, snap, config)
        else:
            recipes = run.night.options.get("recipes") or recipes_with_teacher(settings.night.recipes, settings.teacher)
            dataset = build(snap, recipes, services.memory, compose, config, pairs=trains_on_pairs(run))
            if reason := nothing_new(run, snap):
                raise NotEnoughExperienceError(reason)
        again = replayed(run, snap, dataset.examples)
        general = run.wait(rehearse(_base_answer(services), settings.night.rehearsal, _kept_answers(services)))
        general = [e for e in general if snap.held_out_reason(Task(messages=e.messages[:1])) is None]
        dataset = replace(
            dataset,
            examples=[*dataset.examples, *again, *general],
            counts={**dataset.counts, "replay": len(again), RECIPE: len(general)},
            champion=run.done("snapshot")["champion"],
            memory_watermark=memory,
            upto=_line(run),
        )
        services.ledger.set_examples(run.night.id, dataset.examples)
        manifest = write(dataset, folder)
    run.emit("dataset", f"{sum(f.rows for f in manifest.files.values())} rows", counts=manifest.counts)
    figures = manifest.model_dump(mode="json", include={"counts", "dropped", "files"})
    return {"folder": str(folder), **figures, "left": manifest.left[:MOST_LEFT]}


def trains_on_pairs(run: NightRun) -> bool:
    """Whether tonight's training reads preference pairs."""
    return train_config(run).dpo_epochs > 0


def _uploaded(run: NightRun, snap: Snapshot, config: DatasetConfig) -> Dataset:
    """The uploaded file's examples; its lines are in the ledger as tasks, as everything is that was learned."""
    pairs = list(uploaded_examples(run.services, run.night.options))
    for task, _ in pairs:
        keep_task(run.services.ledger, task)
    tasks = {task.id: task for task, _ in pairs}
    material = Snapshot([], [], tasks, seed=config.seed, held_out_tasks=snap.held_out_tasks)
    # Whoever uploads a file wants all of it: the caps are against one voice drowning the others of a day.
    room = {name: max(len(pairs), getattr(config, name)) for name in ("max_per_workload", "max_per_cluster")}
    roomy = config.model_copy(update=room)
    dataset = build_uploaded(material, (example for _, example in pairs), run.services.memory, compose, roomy)
    return replace(dataset, served=served_of(snap))


def uploaded_examples(services: Services, options: dict[str, Any]) -> Iterator[tuple[Task, Example]]:
    """What a job over an uploaded file trains on. ConfigError for a bad line, NotFoundError for a deleted file."""
    tenant, file_id = options["tenant"], options["training_file"]
    files.get(services.ledger.database, file_id, tenant=tenant)
    tools = services.settings.agent.tools
    with boundary(LedgerError, f"cannot read file {file_id}"):
        lines = (services.settings.files_dir / file_id).open(encoding="utf-8", errors="replace")
    with lines:
        yield from read_upload(lines, options["method"], file_id=file_id, tenant=tenant, tools=tools)


def _base_answer(services: Services) -> Answer:
    """Generation 0 in plain chat, greedily; an answer cut by its budget would teach to stop in mid-sentence."""

    async def answer(messages: list[Message]) -> str | None:
        base = services.ledger.generation(0).served_name
        reply = await services.llm.complete(ChatRequest(base, messages, dict(REHEARSED)))
        return reply.text if reply.finish_reason == "stop" else None

    return answer


def _kept_answers(services: Services) -> Path:
    """The file of what this base model said, asked so: with another model, or other weights under its name, it is
    another file."""
    files = sorted(
        path
        for pattern in ("*.safetensors", "*.jinja", "config.json", "tokenizer*.json")
        for path in services.base_model.glob(pattern)
    )
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    name = content_hash([services.settings.model, weights, REHEARSED])[:32]
    return services.settings.data_dir / RECIPE / f"{name}.json"


def _line(run: NightRun) -> dict[str, int]:
    """What was drawn, and where the night's practice came to its end."""
    practised = run.services.ledger.stage(run.night.id, PRACTICE)
    return run.done("snapshot")["upto"] | ({PRACTICE: practised.output["upto"]} if practised else {})


def replayed(run: NightRun, snap: Snapshot, new: Sequence[Example]) -> list[Example]:
    """Earlier nights' examples to train on beside `new` ones, of nights that the champion comes from. A question that
    has examples today is not replayed: today's word on it is the later one. Nor is what rests on a word that was
    rejected since, nor what the caps leave no room for beside the new ones. When the night starts from the base model,
    all runs are new again, and only what uploaded files taught is replayed, all of it."""
    ledger, settings = run.services.ledger, run.services.settings
    champion, began = run.done("snapshot")["champion"], run.night.created_at
    line = promotion.ancestry(ledger, champion)
    past = [n for n in ledger.nights() if n.status is NightStatus.PROMOTED and n.candidate in line]
    earlier = [example for night in past for example in ledger.examples(night.id) if example.recipe != RECIPE]
    tasks = ledger.tasks({example.task_id for example in [*earlier, *new]})
    heard = runs.feedback_by_id(ledger.database, {source for e in [*earlier, *new] for source in e.sources})
    rejected = {said.id for said in heard if said.trust is Trust.REJECTED}
    today = {(e.tenant, tasks[e.task_id].fingerprint) for e in new if e.task_id in tasks}
    allowed = [
        e
        for e in earlier
        if not rejected & set(e.sources)
        and (e.tenant, tasks[e.task_id].fingerprint) not in today
        and snap.held_out_reason(tasks[e.task_id]) is None
    ]
    if starts_from(run) == "base":
        uploaded = (e for e in allowed if e.recipe == UPLOADED)
        return list({e.id: e for e in uploaded if e.kind is ExampleKind.SFT or trains_on_pairs(run)}.values())
    share, shares = settings.night.replay_share, None
    if settings.night.replay_schedule == "retention":
        served = [p.to_generation for p in ledger.promotions() if p.at <= began and p.to_generation != champion]
        measured = [e for e in ledger.evaluations() if e.created_at <= began]
        fewest = settings.gate.min_control_tasks
        shares = replay_shares(share, *retention(measured, [*served, champion], fewest=fewest))
        run.emit("dataset", "replay shares by retention", shares=shares)
    caps = Caps(settings.dataset, tasks, heard)
    for example in new:
        if example.task_id in tasks:
            caps.holds(example)
    return replay(
        allowed,
        new=len(new),
        share=share,
        seed=settings.dataset.seed,
        champion=champion,
        shares=shares,
        fits=caps.takes,
    )
