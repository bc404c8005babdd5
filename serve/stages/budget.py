"""What a night may spend on practice and training. Everything else it does is not cut, evaluation least of all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from statistics import median_low
from typing import Any

from memory.ledger import Ledger
from memory.night_records import StageRun
from serve.settings import NightConfig
from serve.stages.night_run import NightRun, OverBudgetError

NIGHTS = 5
"""Of how many the time for evaluation is the median."""


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


def practice_limit(run: NightRun) -> float | None:
    """Seconds that tonight's practice may take: what the exam and training need is kept for them, but practice may
    have half of what the exam leaves in any case, as before the first training nobody knows what that needs. None = no
    limit."""
    config, ledger = run.services.settings.night, run.services.ledger
    if config.max_seconds is None:
        return None
    spent, kept = _committed(config.max_seconds, ledger, run.night.id)
    last = last_trained(ledger)
    return practice_share(config.max_seconds - spent - kept, uncut(last)[1] if last else None)


def practice_share(left: float, training: float | None) -> float:
    """Of `left` seconds for practice and training together, those of practice; `training`: what it would take."""
    return max(0.0, left / 2, left - training if training is not None else 0.0)


def after_training(ledger: Ledger) -> float | None:
    """How long evaluation takes, with all that follows: the median of the newest nights that came so far, for one on a
    busy machine must not end all training. None when none has."""
    took = [
        sum(stage.seconds for stage in night[_place(night, "train") + 1 :]) for night in islice(trained(ledger), NIGHTS)
    ]
    return median_low(took) if took else None


def foretold(
    config: NightConfig,
    tokens: int,
    train_seconds: float | None,
    night_seconds: float | None,
    practice_seconds: float = 0.0,
) -> tuple[list[str], bool]:
    """What a dry run says of the budget, nothing where it is kept without being felt; and whether it lets train."""
    told: list[str] = []
    if config.max_tokens is not None and tokens > config.max_tokens:
        told.append(f"night.max_tokens shortens training to about {config.max_tokens / tokens:.0%} of its steps")
    if config.max_seconds is None:
        return told, True
    if not train_seconds or not night_seconds:
        return [*told, "what night.max_seconds leaves to train is not known before the first night"], True
    left = config.max_seconds - (night_seconds - practice_seconds - train_seconds)
    practice = min(practice_seconds, practice_share(left, train_seconds))
    if practice < practice_seconds:
        told.append(f"night.max_seconds shortens practice to about {practice / practice_seconds:.0%} of its tries")
    share = (left - practice) / train_seconds
    if share <= 0:
        told.append("night.max_seconds leaves no time to train: the night would skip itself")
    elif share < 1:
        told.append(f"night.max_seconds shortens training to about {share:.0%} of its steps")
    return told, share > 0


def last_trained(ledger: Ledger) -> list[StageRun]:
    """The stages of the newest night that trained and went on to its end; none without one."""
    return next(trained(ledger), [])


def trained(ledger: Ledger) -> Iterator[list[StageRun]]:
    """The stages of the nights that trained and went on to their end, the newest first."""
    for night in reversed(ledger.nights()):
        stages = ledger.stages(night.id)
        if {"train", "evaluate"} <= {stage.stage for stage in stages}:
            yield stages


def uncut(stages: list[StageRun]) -> tuple[float, float]:
    """Tokens and seconds that training would have taken that night had no budget shortened it."""
    done = stages[_place(stages, "train")].output
    # An older trainer has not said what it had planned.
    planned = done.get("planned_tokens") or done["tokens"]
    return planned, done["seconds"] * planned / max(1, done["tokens"])


def _affordable(config: NightConfig, ledger: Ledger, night_id: str) -> dict[str, Any]:
    """What is left of the seconds is, at the last trainer's pace, a number of tokens as well: so the steps are fewer
    from the start, and the learning rate comes to its end."""
    limits: dict[str, Any] = {"max_tokens": config.max_tokens}
    if config.max_seconds is not None:
        last = last_trained(ledger)
        spent, kept = _committed(config.max_seconds, ledger, night_id)
        left = config.max_seconds - spent - kept
        if left <= 0:
            told = f"no time to train: night.max_seconds is {config.max_seconds:g}, {spent:.0f} s are spent"
            told += f", and evaluation with all that follows takes {kept:.0f} s by the last nights" if last else ""
            told += "; until it is raised, no night will train"
            raise OverBudgetError(told)
        limits["max_seconds"] = left
        if last:
            done = last[_place(last, "train")].output
            affordable = max(1, int(left * done["tokens"] / max(done["seconds"], 1e-9)))
            limits["max_tokens"] = min(affordable, config.max_tokens or affordable)
    return {name: limit for name, limit in limits.items() if limit is not None}


def _committed(max_seconds: float, ledger: Ledger, night_id: str) -> tuple[float, float]:
    """Seconds that the stages so far have spent, and those kept for the exam with all that follows it: as many as it
    takes, or half of what the night has for practice, training and exam where no night has come so far."""
    took = {stage.stage: stage.seconds for stage in ledger.stages(night_id)}
    spent, after = sum(took.values()), after_training(ledger)
    return spent, after if after is not None else (max_seconds - spent + took.get("practice", 0.0)) / 2


def _place(stages: list[StageRun], name: str) -> int:
    return next((i for i, stage in enumerate(stages) if stage.stage == name), -1)
