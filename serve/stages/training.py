"""The training stage: a process of its own, and the candidate generation it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.train import launch
from distill.train.config import TrainConfig, TrainJob
from memory.errors import TrainingError
from memory.forget import must_start_from_base
from memory.night_records import Generation, GenerationStatus
from serve.adapters import adapter_sha256
from serve.rest import out_of_the_way
from serve.stages.budget import training_limits
from serve.stages.material import tonights
from serve.stages.night_run import CancelledNightError, NightRun, Output, starts_from

UNCOMPARED = (
    "warning: no trained prompt was compared with a served one, since the dataset has none with token ids: "
    "a chat template that differs between engine and trainer would go unnoticed until the gate"
)


def train(run: NightRun) -> Output:
    """Train in a process of its own, then enter the adapter as a candidate generation."""
    services, settings = run.services, run.services.settings
    champion = services.ledger.generation(run.done("snapshot")["champion"])
    from_champion = starts_from(run) == "champion" and champion.adapter_path is not None
    # Not toward weights that know what was forgotten.
    may_return = champion.adapter_path is not None and not must_start_from_base(services.ledger.database, champion)
    out = settings.adapters_dir / run.night.id
    job = TrainJob(
        dataset_dir=Path(run.done("dataset")["folder"]),
        base_model=services.base_model,
        parent_adapter=settings.adapters_dir / str(champion.adapter_path) if from_champion else None,
        previous_adapter=settings.adapters_dir / str(champion.adapter_path) if may_return else None,
        most_rank=settings.engine.max_lora_rank,
        out_dir=out,
        config=train_config(run),
        **training_limits(run),
    )

    def progress(event: dict[str, Any]) -> None:
        run.emit("train", str(event.get("event")), **event)

    try:
        with out_of_the_way(services):
            result = launch.run(job, settings.trainer_python, progress, run.cancelled)
    except TrainingError as exc:
        if run.cancelled():
            raise CancelledNightError("the night was cancelled") from exc
        raise
    returned = may_return and result.interpolation is not None and result.interpolation.alpha < 1
    # Weights that lie on the way to the champion know what it knows, wherever they started.
    parent = champion.number if from_champion or returned else 0
    generation = _candidate(run, out.name, adapter_sha256(out), parent)
    figures = result.model_dump(mode="json", exclude={"losses", "config", "adapter_dir", "unreached"})
    losses = result.losses.get("sft") or [0.0]
    if not result.served_prompts:
        run.emit("train", UNCOMPARED)
    told = {"loss": losses[-1], "tokens_per_s": result.tokens_per_s, "served_prompts": result.served_prompts}
    run.emit("train", f"generation {generation.number} trained", **told)
    passes = job.config.model_dump(include={"epochs", "dpo_epochs"})
    left = tonights(run, result.unreached)
    if left:
        run.emit("train", f"{len(left)} runs were not reached by training and wait for the next night", left=len(left))
    return {"generation": generation.number, "losses": result.losses, **passes, **figures, "left": left}


def train_config(run: NightRun) -> TrainConfig:
    """`config_of` for this night."""
    return config_of(run.services.settings.train, run.night.options)


def config_of(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
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
