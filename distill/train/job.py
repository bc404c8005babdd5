"""A training run from its job to its adapter: SFT, then DPO, interruptible at any moment.

Owns the order of the phases, what is kept between attempts (`<out_dir>.work/`) and the one rename that
makes the result visible. Runs inside the trainer process (`python -m distill.train`).
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.train.config import DPO_FILE, RESULT, SFT_FILE, TrainConfig, TrainJob, TrainResult, finished
from distill.train.dpo import check_reference, dpo_trainer
from distill.train.fast import skippable
from distill.train.interpolate import apart, toward_previous
from distill.train.loop import reached, steps_of
from distill.train.model import load_policy, load_tokenizer, save_adapter
from distill.train.progress import Progress, last_checkpoint, told_seconds, write_whole
from distill.train.proof import write_proof
from distill.train.render import Pair, Row, read_examples, render_all, render_pair, render_row
from distill.train.served import FILE as SERVED
from distill.train.served import check_served
from distill.train.sft import sft_trainer
from memory.errors import TrainingError
from memory.records import Example, ExampleKind, content_hash


@dataclass
class Data:
    """What a dataset folder gives a run."""

    rows: list[Row]
    pairs: list[Pair]
    too_long: int
    flaws: list[str]
    """Why examples could not be rendered, one for each."""
    served_prompts: int
    """That were compared."""
    sources: dict[str, list[list[str]]] = field(default_factory=dict)
    """Phase -> what each of its rows or pairs rests on."""


@dataclass(frozen=True)
class Plan:
    """A phase over all its epochs."""

    steps: int
    tokens: int
    trained: int
    """Those of the tokens that the loss falls on."""


@dataclass
class Tally:
    """What the phases measured."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    reference_loss: float | None = None
    done: dict[str, int] = field(default_factory=dict)
    """Steps by phase."""
    steps: int = 0
    tokens: int = 0
    trained: float = 0.0
    loop_tokens: int = 0
    loop_seconds: float = 0.0


def train(job: TrainJob) -> TrainResult:
    """Run a job, or go on with it from its last checkpoint, or return the result it already has.

    Raises TrainingError for data, models or settings that cannot be trained with.
    """
    done = finished(job)
    if done is not None:
        return done
    if job.out_dir.exists():
        raise TrainingError(f"{job.out_dir} exists and is no finished run; remove it or choose another folder")
    progress = Progress(job.progress_path, max_tokens=job.max_tokens, max_seconds=job.max_seconds)
    tokenizer = load_tokenizer(job.base_model)
    data = load_data(job, tokenizer)
    same = _keep_same_work(job, progress.main)
    if job.config.processes > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
    config, note = _profile(job)
    plans = _plans(data, config)
    wanted, total = sum(plan.steps for plan in plans.values()), sum(plan.tokens for plan in plans.values())
    # A phase whose budget is known to end early has fewer steps from the start, so that its rate still decays to 0.
    share = min(1.0, (job.max_tokens or total) / total)
    steps = {phase: max(min(1, plan.steps), int(plan.steps * share)) for phase, plan in plans.items()}
    progress.steps = sum(steps.values())
    progress.seconds_before = told_seconds(job.progress_path) if same else 0.0
    note = "; ".join(part for part in (note, _told(data.flaws)) if part)
    figures = {"profile": config.profile, "rows": len(data.rows), "pairs": len(data.pairs), "too_long": data.too_long}
    figures |= {"unrendered": len(data.flaws), "served_prompts": data.served_prompts}
    progress.say("start", steps=progress.steps, **figures, note=note)

    tally = Tally()
    policy = job.parent_adapter
    if data.rows:
        policy = _phase("sft", job, config, tokenizer, data, policy, progress, tally, plans["sft"], steps["sft"])
    progress.offset, progress.tokens_before = tally.steps, tally.tokens
    if data.pairs and not (data.rows and progress.spent(tally.tokens)):
        policy = _phase("dpo", job, config, tokenizer, data, policy, progress, tally, plans["dpo"], steps["dpo"])
    assert policy is not None
    if tally.steps < wanted:
        cut = f"{tally.steps} of {wanted} steps: the budget allowed no more"
        note = f"{note}; {cut}" if note else cut
    between = None
    if progress.main and config.interpolate:
        policy, between = toward_previous(job, config, tokenizer, policy)
    result = _result(job, config, note, data, progress, tally)
    result = result.model_copy(update={"planned_tokens": total, "interpolation": between})
    if progress.main:
        _publish(job, policy, result)
        progress.say("done", step=tally.steps, steps=tally.steps, tokens=result.tokens, eta_s=0.0, note=note)
    return result


def load_data(job: TrainJob, tokenizer: Any) -> Data:
    """Rows and pairs of a job's dataset as token ids.

    An example that cannot be rendered is left out and counted. Raises TrainingError when nothing is left to learn, or
    when they would be other tokens than are served.
    """
    config = job.config
    served = check_served(job.dataset_dir / SERVED, tokenizer)
    examples, _ = apart(read_examples(job.dataset_dir / SFT_FILE, ExampleKind.SFT), config)
    rows, flaws = render_all(examples, render_row, tokenizer)
    pairs: list[tuple[Example, Pair]] = []
    if config.dpo_epochs:
        preferences = read_examples(job.dataset_dir / DPO_FILE, ExampleKind.DPO)
        pairs, more = render_all(preferences, render_pair, tokenizer)
        flaws += more
    fit_rows = [(example, row) for example, row in rows if len(row.input_ids) <= config.max_length]
    fit_pairs = [(example, pair) for example, pair in pairs if pair.longest <= config.max_length]
    too_long = len(rows) + len(pairs) - len(fit_rows) - len(fit_pairs)
    if not fit_rows and not fit_pairs:
        long = f"all {too_long} examples are longer than {config.max_length} tokens" if too_long else ""
        why = "; ".join(part for part in (long, _told(flaws)) if part) or "no examples"
        raise TrainingError(f"nothing to train on in {job.dataset_dir}: {why}")
    sources = {"sft": [e.sources for e, _ in fit_rows], "dpo": [e.sources for e, _ in fit_pairs]}
    return Data([row for _, row in fit_rows], [pair for _, pair in fit_pairs], too_long, flaws, served, sources)


def _told(flaws: list[str]) -> str:
    return f"{len(flaws)} examples left out that cannot be rendered, such as: {flaws[0]}" if flaws else ""


def _profile(job: TrainJob) -> tuple[TrainConfig, str]:
    """The settings with a profile that the base model's architecture can do, and why if it is another one."""
    if job.config.profile != "upper-cached":
        return job.config, ""
    from types import SimpleNamespace

    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(str(job.base_model))
    if skippable(SimpleNamespace(config=architecture)):
        return job.config, ""
    note = f"profile upper-cached does not know architecture {architecture.model_type}: training with upper"
    return job.config.model_copy(update={"profile": "upper"}), note


def _plans(data: Data, config: TrainConfig) -> dict[str, Plan]:
    """The phases as they would be without a budget."""
    return {
        "sft": Plan(
            steps_of(len(data.rows), config.batch_size, config.epochs, config),
            sum(len(r.input_ids) for r in data.rows) * config.epochs,
            sum(r.trained for r in data.rows) * config.epochs,
        ),
        "dpo": Plan(
            steps_of(len(data.pairs), config.dpo_batch_size, config.dpo_epochs, config),
            sum(p.tokens for p in data.pairs) * config.dpo_epochs,
            sum(p.trained for p in data.pairs) * config.dpo_epochs,
        ),
    }


def _phase(
    phase: str,
    job: TrainJob,
    config: TrainConfig,
    tokenizer: Any,
    data: Data,
    policy: Path | None,
    progress: Progress,
    tally: Tally,
    plan: Plan,
    steps: int,
) -> Path:
    """Train one phase on top of `policy` for `steps` of those planned.

    Returns the adapter folder it left, at once when it is there.
    """
    adapter, measured = job.work_dir / f"{phase}-adapter", job.work_dir / f"{phase}.json"
    if not (adapter.is_dir() and measured.is_file()):
        folder = job.work_dir / phase
        model = load_policy(job.base_model, policy, config, tokenizer.pad_token_id)
        reference = None
        fewer = steps if steps < plan.steps else None
        if phase == "sft":
            trainer = sft_trainer(model, tokenizer, data.rows, config, folder, progress, fewer)
        else:
            trainer = dpo_trainer(model, tokenizer, data.pairs, config, folder, progress, fewer)
            reference = trainer.starting_loss()
            check_reference(reference, tolerance=0.02 if trainer.args.bf16 else 1e-3)
        checkpoint = last_checkpoint(folder) if config.checkpoint_steps else None
        seen, began = _tokens_at(checkpoint), time.monotonic()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        tally.loop_tokens += int(trainer.state.num_input_tokens_seen) - seen
        tally.loop_seconds += time.monotonic() - began
        if progress.main:
            save_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            kept = {"losses": losses, "reference_loss": reference}
            kept |= {"steps": trainer.state.global_step, "tokens": int(trainer.state.num_input_tokens_seen)}
            write_whole(measured, json.dumps(kept))
            shutil.rmtree(folder, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        del trainer, model
        gc.collect()
    kept = json.loads(measured.read_text())
    tally.losses[phase] = kept["losses"]
    tally.reference_loss = kept["reference_loss"]
    tally.done[phase] = kept["steps"]
    tally.steps += kept["steps"]
    tally.tokens += kept["tokens"]
    tally.trained += plan.trained * kept["tokens"] / plan.tokens
    return adapter


def _tokens_at(checkpoint: Path | None) -> int:
    """Tokens that a phase had seen at a checkpoint."""
    if checkpoint is None:
        return 0
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["num_input_tokens_seen"])


def _result(job: TrainJob, config: TrainConfig, note: str, data: Data, progress: Progress, tally: Tally) -> TrainResult:
    tokens, trained = tally.tokens, round(tally.trained)
    return TrainResult(
        adapter_dir=job.out_dir,
        profile=config.profile,
        note=note,
        sft_rows=len(data.rows),
        dpo_pairs=len(data.pairs),
        too_long=data.too_long,
        unrendered=len(data.flaws),
        served_prompts=data.served_prompts,
        unreached=_unreached(data, config, tally.done),
        losses=tally.losses,
        tokens=tokens,
        trained_tokens=trained,
        mask_share=trained / tokens,
        seconds=progress.seconds,
        tokens_per_s=tally.loop_tokens / tally.loop_seconds if tally.loop_seconds else 0.0,
        reference_loss=tally.reference_loss,
        config=job.config,
    )


def _unreached(data: Data, config: TrainConfig, done: dict[str, int]) -> list[str]:
    """The sources of what no step saw, less those of what one saw."""
    lengths = {"sft": [len(r.input_ids) for r in data.rows], "dpo": [p.longest for p in data.pairs]}
    seen: set[str] = set()
    everything: set[str] = set()
    for phase, batch in (("sft", config.batch_size), ("dpo", config.dpo_batch_size)):
        places = reached(lengths[phase], batch, config, done.get(phase, 0))
        seen |= {source for at in places for source in data.sources[phase][at]}
        everything |= {source for sources in data.sources[phase] for source in sources}
    return sorted(everything - seen)


def _publish(job: TrainJob, adapter: Path, result: TrainResult) -> None:
    """Make the run's folder visible, complete, by one rename."""
    ready = job.work_dir / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    shutil.copytree(adapter, ready)
    write_proof(job.base_model, ready)
    write_whole(ready / RESULT, result.model_dump_json(indent=2))
    ready.rename(job.out_dir)


def _keep_same_work(job: TrainJob, main: bool) -> bool:
    """Whether an earlier attempt at this very job is gone on with: checkpoints that were made from other data,
    settings or models are forgotten."""
    key_file = job.work_dir / "key"
    files = [job.dataset_dir / name for name in (SFT_FILE, DPO_FILE)]
    texts = [f.read_text(encoding="utf-8") if f.is_file() else "" for f in files]
    settings = job.config.model_dump(exclude={"threads", "checkpoint_steps", "cache_ram_mb"})
    key = content_hash([settings, str(job.base_model), str(job.parent_adapter), texts, job.max_tokens])
    key = content_hash([key, str(job.previous_adapter), job.most_rank]) if job.config.interpolate else key
    same = key_file.is_file() and key_file.read_text() == key
    if same or not main:
        return same
    for phase in ("sft", "dpo", "interpolated"):
        shutil.rmtree(job.work_dir / phase, ignore_errors=True)
        shutil.rmtree(job.work_dir / f"{phase}-adapter", ignore_errors=True)
        (job.work_dir / f"{phase}.json").unlink(missing_ok=True)
    job.work_dir.mkdir(parents=True, exist_ok=True)
    write_whole(key_file, key)
    return False
