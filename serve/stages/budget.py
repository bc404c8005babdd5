"""What a night may spend on training. Everything else it does is not cut, evaluation least of all."""

from __future__ import annotations

from typing import Any

from memory.ledger import Ledger
from memory.night_records import StageRun
from serve.settings import NightConfig
from serve.stages.night_run import NightRun, OverBudgetError


def training_limits(run: NightRun) -> dict[str, Any]:
    """The trainer's `max_tokens` and `max_seconds`, where the settings limit the night.

    Decided once, in the ledger before training begins: the trainer of a night that was killed goes on from its
    checkpoints only under the same numbers, whatever the settings say by then. (How long its attempts took counts
    against `max_seconds` there.) Raises OverBudgetError when nothing is left.
    """
    ledger = run.services.ledger
    decided = ledger.night(run.night.id).limits
    if decided is not None:
        return decided
    limits = _affordable(run.services.settings.night, ledger, run.night.id)
    ledger.set_limits(run.night.id, limits)
    if limits:
        told = " and ".join(f"{limit:.0f} {name.removeprefix('max_')}" for name, limit in limits.items())
        run.emit("train", f"the night's budget leaves {told} for training", **limits)
    return limits


def _affordable(config: NightConfig, ledger: Ledger, night_id: str) -> dict[str, Any]:
    """Of the seconds, those of the stages before are spent and those that the stages after it took last time are kept
    for them: half of what is left where no night has trained. The rest, at the last trainer's pace, is a number of
    tokens as well: so the steps are fewer from the start, and the learning rate comes to its end.
    """
    limits: dict[str, Any] = {"max_tokens": config.max_tokens}
    if config.max_seconds is not None:
        last, after = _last_trained(ledger), after_training(ledger)
        spent = sum(stage.seconds for stage in ledger.stages(night_id))
        kept = after if after is not None else (config.max_seconds - spent) / 2
        left = config.max_seconds - spent - kept
        if left <= 0:
            told = f"no time to train: night.max_seconds is {config.max_seconds:g}, {spent:.0f} s are spent"
            told += f", and evaluation with all that follows took {kept:.0f} s last time" if last else ""
            raise OverBudgetError(told)
        limits["max_seconds"] = left
        if last:
            done = last[_place(last, "train")].output
            affordable = max(1, int(left * done["tokens"] / max(done["seconds"], 1e-9)))
            limits["max_tokens"] = min(affordable, config.max_tokens or affordable)
    return {name: limit for name, limit in limits.items() if limit is not None}


def after_training(ledger: Ledger) -> float | None:
    """How long evaluation, with all that follows, took last time; None when no night has come so far."""
    last = _last_trained(ledger)
    return sum(stage.seconds for stage in last[_place(last, "train") + 1 :]) if last else None


def foretold(config: NightConfig, tokens: int, train_seconds: float | None, night_seconds: float | None) -> list[str]:
    """What a dry run says of the budget; nothing where it is kept without being felt."""
    told: list[str] = []
    if config.max_tokens is not None and tokens > config.max_tokens:
        told.append(f"night.max_tokens shortens training to about {config.max_tokens / tokens:.0%} of its steps")
    if config.max_seconds is not None and train_seconds and night_seconds and night_seconds > config.max_seconds:
        left = max(0.0, train_seconds - (night_seconds - config.max_seconds))
        share = left / train_seconds
        told.append(
            f"night.max_seconds shortens training to about {share:.0%} of its steps"
            if share
            else "night.max_seconds leaves no time to train: the night would skip itself"
        )
    return told


def _last_trained(ledger: Ledger) -> list[StageRun]:
    """The stages of the newest night that trained and went on to its end; none without one."""
    for night in reversed(ledger.nights()):
        stages = ledger.stages(night.id)
        if {"train", "evaluate"} <= {stage.stage for stage in stages}:
            return stages
    return []


def _place(stages: list[StageRun], name: str) -> int:
    return next((i for i, stage in enumerate(stages) if stage.stage == name), -1)
