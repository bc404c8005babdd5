"""The stages of a night, in order. Each reads the ledger, does one thing and returns its output as JSON.

A stage may be run again after a crash: everything it writes is idempotent (ids follow from content,
folders appear by rename, the ledger's first row wins), so `serve.night` only has to call them in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from agent.llm import ChatRequest
from agent.prompts import compose
from agent.verify import verify
from distill.credit import credit
from distill.dataset import Dataset, DatasetConfig, build, build_uploaded, read_manifest, write
from distill.equivalence import MAX_TOKENS
from distill.principles import Ask, DistilReport, distill_principles, past_runs
from distill.rehearsal import RECIPE, Answer, rehearse
from distill.replay import replay
from distill.snapshot import Snapshot
from distill.train import launch
from distill.train.config import TrainConfig, TrainJob
from distill.uploads import read_upload
from evals.gate import GateDecision, decide
from evals.runner import evaluate
from evals.suites import Suite
from memory import files
from memory.errors import ConflictError, LedgerError, NightschoolError, TrainingError, boundary
from memory.forget import must_start_from_base
from memory.night_records import Evaluation, Generation, GenerationStatus, Night, NightStatus
from memory.records import Example, Message, Purpose, Task, Trajectory
from serve import lessons, promotion
from serve.adapters import adapter_sha256
from serve.events import Emit
from serve.reports import write_night_report
from serve.suites import night_suites
from serve.wiring import Services, keep_task

T = TypeVar("T")
Output = dict[str, Any]


class CancelledNightError(NightschoolError):
    """Somebody asked for the night to stop."""


@dataclass(frozen=True)
class NightRun:
    """What every stage is handed: the services, the night, and the outputs of the stages before."""

    services: Services
    night: Night
    emit: Emit
    done: Callable[[str], Output]
    """Output of an earlier stage by name."""

    @property
    def folder(self) -> Path:
        return self.services.settings.night_dir(self.night.id)

    def cancelled(self) -> bool:
        """Asked for by a file, so that the wish survives a crash."""
        return (self.folder / "cancel").exists()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run async work on the service's loop from the night's thread; stops it when the night is cancelled."""
        future = asyncio.run_coroutine_threadsafe(work, self.services.loop)
        while True:
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if future.done():
                    raise
                if self.cancelled():
                    future.cancel()
                    raise CancelledNightError("the night was cancelled") from None


def snapshot(run: NightRun) -> Output:
    """Draw the line: what happened up to here teaches tonight, what comes later waits."""
    settings, ledger = run.services.settings, run.services.ledger
    since = {"trajectory": 0, "feedback": 0}
    # Weights cannot unlearn: a champion that knows what was forgotten is no start for the next one.
    tainted = must_start_from_base(ledger.database, ledger.champion())
    start = "base" if tainted else settings.night.train_from
    if start == "champion":
        for night in ledger.nights():
            stage = ledger.stage(night.id, "snapshot")
            if night.status is NightStatus.PROMOTED and stage is not None:
                since = stage.output["upto"]
    champion = ledger.champion().number
    upto = ledger.watermark()
    new = len(ledger.trajectories(after_seq=since["trajectory"], upto_seq=upto["trajectory"], purpose=Purpose.SERVE))
    told = f"{new} runs since the last promoted night"
    told += "; starting from the base model, since the champion learned from what was forgotten" if tainted else ""
    run.emit("snapshot", told, runs=new)
    return {"since": since, "upto": upto, "champion": champion, "runs": new, "train_from": start}


def load_snapshot(run: NightRun) -> Snapshot:
    """The records behind the watermark, always the same for the same night."""
    drawn, ledger = run.done("snapshot"), run.services.ledger
    runs = {t.id: t for t in ledger.trajectories(upto_seq=drawn["upto"]["trajectory"], purpose=Purpose.SERVE)}
    new = ledger.trajectories(
        after_seq=drawn["since"]["trajectory"], upto_seq=drawn["upto"]["trajectory"], purpose=Purpose.SERVE
    )
    # A run that was corrected later than it was made is new experience as well.
    said = ledger.feedback(after_seq=drawn["since"]["feedback"], upto_seq=drawn["upto"]["feedback"])
    wanted = {t.id for t in new} | {f.trajectory_id for f in said if f.trajectory_id in runs}
    trajectories = [runs[id] for id in sorted(wanted)]
    feedback = [f for f in ledger.feedback(upto_seq=drawn["upto"]["feedback"]) if f.trajectory_id in wanted]
    held_out = [item.task for suite in suites_of(run) for item in suite.tasks]
    return Snapshot(
        trajectories=trajectories,
        feedback=feedback,
        tasks=ledger.tasks(t.task_id for t in trajectories),
        held_out_tasks=held_out,
        seed=run.services.settings.dataset.seed,
    )


def suites_of(run: NightRun) -> list[Suite]:
    """The night's suites, frozen in its folder at first use."""
    return night_suites(run.services.settings, run.services.ledger, run.folder)


def uploaded_examples(services: Services, options: dict[str, Any]) -> Iterator[tuple[Task, Example]]:
    """What a job over an uploaded file trains on. ConfigError for a bad line, NotFoundError for a deleted file."""
    tenant, file_id = options["tenant"], options["training_file"]
    files.get(services.ledger.database, file_id, tenant=tenant)
    tools = services.settings.agent.tools
    with boundary(LedgerError, f"cannot read file {file_id}"):
        lines = (services.settings.files_dir / file_id).open(encoding="utf-8", errors="replace")
    with lines:
        yield from read_upload(lines, options["method"], file_id=file_id, tenant=tenant, tools=tools)


def judge_feedback(run: NightRun) -> Output:
    """Decide which feedback may teach, and credit what was recalled with how the runs ended."""
    if "training_file" in run.night.options:
        return {"trust": {}}
    ledger, drawn = run.services.ledger, run.done("snapshot")
    trajectories = ledger.trajectories(upto_seq=drawn["upto"]["trajectory"], purpose=Purpose.SERVE)
    feedback = ledger.feedback(upto_seq=drawn["upto"]["feedback"])
    tasks = ledger.tasks(t.task_id for t in trajectories)
    counts: dict[str, int] = {}
    for judgement in credit(feedback, trajectories, tasks, verify):
        ledger.set_trust(judgement.feedback_id, judgement.trust, judgement.reason)
        counts[judgement.trust.value] = counts.get(judgement.trust.value, 0) + 1
    credited = lessons.credit_runs(run.services, trajectories, ledger.feedback(upto_seq=drawn["upto"]["feedback"]))
    told = ", ".join(f"{count} {trust}" for trust, count in counts.items())
    run.emit("credit", f"feedback judged: {told or 'none new'}", **counts)
    return {"trust": counts, "credited": credited}


def remember(run: NightRun) -> Output:
    """Distil principles and keep successful and corrected runs, in the ledger first, then in the index."""
    if "training_file" in run.night.options:
        return {"principles": 0, "merged": 0, "dropped": {}, "runs": 0, "moved": {}}
    services, snap = run.services, load_snapshot(run)
    champion = services.ledger.generation(run.done("snapshot")["champion"])

    def ask(max_tokens: int) -> Ask:
        async def reply(prompt: str, regex: str | None) -> str:
            sampling = {"temperature": 0.0, "max_tokens": max_tokens}
            messages = [{"role": "user", "content": prompt}]
            name = promotion.model_ref(champion).name
            return (await services.llm.complete(ChatRequest(name, messages, sampling, regex))).text

        return reply

    async def distil() -> tuple[DistilReport, dict[str, int]]:
        known, limit = services.ledger.principles(), services.settings.night.principles
        async with services.residency.using(champion):
            found = await distill_principles(snap, ask(120), known, limit=limit, concurrency=8)
            return found, await lessons.keep_principles(services, found.principles, ask(MAX_TOKENS))

    report, kept = run.wait(distil())
    runs = past_runs(snap, services.ledger.past_runs())
    for past_run in runs:
        services.ledger.add_past_run(past_run)
    moved = lessons.review_items(services, champion.number)
    told = f"{kept['added']} principles ({kept['merged']} merged), {len(runs)} runs remembered"
    run.emit("principles", told, dropped=report.dropped, moved=moved)
    counts = {"principles": kept["added"], "merged": kept["merged"], "runs": len(runs)}
    return {**counts, "dropped": report.dropped, "moved": moved}


def make_dataset(run: NightRun) -> Output:
    """Recipes over the snapshot, every example laid out as it would be served, replay beside the new ones."""
    services, settings, snap = run.services, run.services.settings, load_snapshot(run)
    folder = run.folder / "dataset"
    if (manifest := read_manifest(folder)) is None:
        config = settings.dataset.model_copy(update={"min_examples": settings.night.min_examples})
        if "training_file" in run.night.options:
            dataset = _uploaded(run, snap.held_out_tasks, config)
        else:
            recipes = run.night.options.get("recipes") or settings.night.recipes
            dataset = build(snap, recipes, services.memory, compose, config)
        again = replayed(run, snap, len(dataset.examples))
        general = run.wait(rehearse(_base_answer(services), settings.night.rehearsal))
        dataset = replace(
            dataset,
            examples=[*dataset.examples, *again, *general],
            counts={**dataset.counts, "replay": len(again), RECIPE: len(general)},
        )
        services.ledger.add_examples(run.night.id, dataset.examples)
        manifest = write(dataset, folder)
    run.emit("dataset", f"{sum(f.rows for f in manifest.files.values())} rows", counts=manifest.counts)
    return {"folder": str(folder), **manifest.model_dump(mode="json", include={"counts", "dropped", "files"})}


def _uploaded(run: NightRun, held_out: list[Task], config: DatasetConfig) -> Dataset:
    """The uploaded file's examples; its lines are in the ledger as tasks, as everything is that was learned."""
    pairs = list(uploaded_examples(run.services, run.night.options))
    for task, _ in pairs:
        keep_task(run.services.ledger, task)
    material = Snapshot([], [], {task.id: task for task, _ in pairs}, seed=config.seed, held_out_tasks=held_out)
    # Whoever uploads a file wants all of it: the caps are against one voice drowning the others of a day.
    roomy = config.model_copy(update={"max_per_workload": max(len(pairs), config.max_per_workload)})
    return build_uploaded(material, (example for _, example in pairs), run.services.memory, compose, roomy)


def _train_config(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """The settings' configuration with a job's method and hyperparameters in it."""
    given: dict[str, Any] = options.get("hyperparameters", {})
    dpo = options.get("method") == "dpo"
    changed: dict[str, Any] = {"seed": options["seed"]} if "seed" in options else {}
    if options.get("method") == "supervised":
        changed["dpo_epochs"] = 0
    if dpo:
        changed["dpo_epochs"] = given.get("n_epochs", config.dpo_epochs or 2)
    elif "n_epochs" in given:
        changed["epochs"] = given["n_epochs"]
    if "batch_size" in given:
        changed["dpo_batch_size" if dpo else "batch_size"] = given["batch_size"]
    if "learning_rate_multiplier" in given:
        name = "dpo_learning_rate" if dpo else "learning_rate"
        changed[name] = getattr(config, name) * given["learning_rate_multiplier"]
    if "beta" in given:
        changed["dpo_beta"] = given["beta"]
    return config.model_copy(update=changed)


def _base_answer(services: Services) -> Answer:
    """Generation 0 in plain chat, greedily; an answer cut by its budget would teach to stop in mid-sentence."""

    async def answer(messages: list[Message]) -> str | None:
        base = services.ledger.generation(0).served_name
        reply = await services.llm.complete(ChatRequest(base, messages, {"temperature": 0.0, "max_tokens": 96}))
        return reply.text if reply.finish_reason == "stop" else None

    return answer


def replayed(run: NightRun, snap: Snapshot, new: int) -> list[Example]:
    """Earlier nights' examples to train on beside `new` ones; none when the night starts from the base model."""
    ledger, settings = run.services.ledger, run.services.settings
    if _starts_from(run) == "base":
        return []
    past = [n for n in ledger.nights() if n.status is NightStatus.PROMOTED and n.id != run.night.id]
    earlier = [example for night in past for example in ledger.examples(night.id) if example.recipe != RECIPE]
    tasks = ledger.tasks({example.task_id for example in earlier})
    allowed = [e for e in earlier if snap.held_out_reason(tasks[e.task_id]) is None]
    return replay(allowed, new=new, share=settings.night.replay_share, seed=settings.dataset.seed)


def _starts_from(run: NightRun) -> str:
    # A night that was begun by an older version has not said.
    return run.done("snapshot").get("train_from", run.services.settings.night.train_from)


def train(run: NightRun) -> Output:
    """Train in a process of its own, then enter the adapter as a candidate generation."""
    services, settings = run.services, run.services.settings
    champion = services.ledger.generation(run.done("snapshot")["champion"])
    from_champion = _starts_from(run) == "champion" and champion.adapter_path is not None
    out = settings.adapters_dir / run.night.id
    job = TrainJob(
        dataset_dir=Path(run.done("dataset")["folder"]),
        base_model=services.base_model,
        parent_adapter=settings.adapters_dir / str(champion.adapter_path) if from_champion else None,
        out_dir=out,
        config=_train_config(settings.train, run.night.options),
    )

    def progress(event: dict[str, Any]) -> None:
        run.emit("train", str(event.get("event")), **event)

    try:
        result = launch.run(job, settings.trainer_python, progress, run.cancelled)
    except TrainingError as exc:
        if run.cancelled():
            raise CancelledNightError("the night was cancelled") from exc
        raise
    parent = champion.number if from_champion else 0
    generation = _candidate(run, out.name, adapter_sha256(out), parent)
    figures = result.model_dump(mode="json", exclude={"losses", "config", "adapter_dir"})
    losses = result.losses.get("sft") or [0.0]
    run.emit("train", f"generation {generation.number} trained", loss=losses[-1], tokens_per_s=result.tokens_per_s)
    return {"generation": generation.number, "losses": result.losses, **figures}


def _candidate(run: NightRun, path: str, sha256: str, parent: int) -> Generation:
    ledger = run.services.ledger
    mine = [g for g in ledger.generations() if g.night_id == run.night.id]
    generation = (
        mine[0]
        if mine
        else Generation(
            number=ledger.next_generation_number(),
            parent=parent,
            base_model=run.services.settings.model,
            adapter_path=path,
            adapter_sha256=sha256,
            night_id=run.night.id,
            status=GenerationStatus.CANDIDATE,
        )
    )
    ledger.add_generation(generation)
    ledger.set_candidate(run.night.id, generation.number)
    return generation


def measure(run: NightRun) -> Output:
    """Champion and candidate on the same frozen suites, with the same memory, by the agent that serves."""
    numbers = (run.done("snapshot")["champion"], run.done("train")["generation"])
    for number in numbers:
        for suite in suites_of(run):
            if not _evaluations(run, number, suite):
                run.wait(_measure(run, number, suite))
    return {"generations": list(numbers), "suites": {s.name: s.hash for s in suites_of(run)}}


def _evaluations(run: NightRun, number: int, suite: Suite) -> list[Evaluation]:
    return run.services.ledger.evaluations(night_id=run.night.id, generation=number, suite_hash=suite.hash)


async def _measure(run: NightRun, number: int, suite: Suite) -> None:
    services, generation = run.services, run.services.ledger.generation(number)

    def progress(done: int, total: int) -> None:
        run.emit("evaluate", f"generation {number} on {suite.name}", done=done, total=total)

    async with services.residency.using(generation):
        evaluation, trajectories = await evaluate(
            suite,
            promotion.model_ref(generation),
            replace(services.deps, checkpointer=None),
            memory=True,
            memory_watermark=services.ledger.memory_watermark(),
            concurrency=services.settings.night.concurrency,
            on_progress=progress,
            night_id=run.night.id,
        )
    await asyncio.to_thread(store_evaluation, services, suite, evaluation, trajectories)


def store_evaluation(services: Services, suite: Suite, evaluation: Evaluation, trajectories: list[Trajectory]) -> None:
    """Tasks, runs and, last, the evaluation that refers to them."""
    for item in suite.tasks:
        keep_task(services.ledger, item.task)
    for trajectory in trajectories:
        services.ledger.add_trajectory(trajectory)
    services.ledger.add_evaluation(evaluation)


def judge(run: NightRun) -> Output:
    """The gate: a pure function of the evaluations."""
    champion, candidate = run.done("evaluate")["generations"]
    pairs = [(_evaluations(run, champion, s)[0], _evaluations(run, candidate, s)[0]) for s in suites_of(run)]
    decision: GateDecision = decide(
        [pair for pair in pairs if pair[0].role == "held_out"],
        [pair for pair in pairs if pair[0].role == "control"],
        run.services.settings.gate,
    )
    run.emit("decide", decision.verdict, reasons=decision.reasons)
    return decision.model_dump(mode="json")


def publish(run: NightRun) -> Output:
    """Switch to the candidate, or reject it."""
    services, decision = run.services, run.done("decide")
    number = run.done("train")["generation"]
    if decision["verdict"] != "promote":
        if services.ledger.generation(number).status is GenerationStatus.CANDIDATE:
            services.ledger.advance_generation(number, GenerationStatus.REJECTED)
        run.emit("publish", f"generation {number} rejected: {decision['verdict']}")
        return {"promoted": False}
    if services.ledger.champion().number != number:
        why = f"night {run.night.id}: {decision['reasons'][0]}"
        try:
            run.wait(promotion.promote(services.ledger, services.residency, number, why=why, by="night"))
        except ConflictError:
            if services.ledger.champion().number != number:
                raise
    run.emit("publish", f"generation {number} is the champion")
    return {"promoted": True}


def report(run: NightRun) -> Output:
    """The morning report, as JSON and HTML."""
    path = write_night_report(run.services.ledger, run.night, run.folder, run.services.settings.model)
    run.emit("report", str(path))
    return {"path": str(path)}


STAGES: dict[str, Callable[[NightRun], Output]] = {
    "snapshot": snapshot,
    "credit": judge_feedback,
    "principles": remember,
    "dataset": make_dataset,
    "train": train,
    "evaluate": measure,
    "decide": judge,
    "publish": publish,
    "report": report,
}
"""Name -> stage, in the order of a night (design: snapshot … report)."""
