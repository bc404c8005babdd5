"""What the SFT and the DPO loop have in common: their settings and the order of the rows.

Owns no loss and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.train.config import TrainConfig


def loop_settings(config: TrainConfig, folder: Path, steps: int) -> dict[str, Any]:
    """Settings that TRL's SFT and DPO trainers share, for a phase of `steps` optimizer steps.

    A short phase gets a shorter warm-up: its steps are too few to spend on a rate near 0.
    """
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "gradient_accumulation_steps": config.accumulation,
        "lr_scheduler_type": "linear",
        "warmup_steps": min(config.warmup_steps, steps // 8),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip,
        "max_length": None,
        "seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": [],
        "save_strategy": "steps" if config.checkpoint_steps else "no",
        "save_steps": max(1, config.checkpoint_steps),
        "save_total_limit": 2,
        "use_cpu": not gpu,
        "bf16": gpu,
        "dataloader_pin_memory": gpu,
        # TRL turns it on by default, under the name that transformers 6 drops.
        "gradient_checkpointing": config.activation_checkpointing,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def steps_of(items: int, batch: int, epochs: int, config: TrainConfig) -> int:
    """Optimizer steps of a phase over `items` rows or pairs, `batch` per step and process."""
    batches = math.ceil(math.ceil(items / config.processes) / batch)
    return math.ceil(batches / config.accumulation) * epochs


@dataclass(frozen=True)
class LengthOrder:
    """An order of rows, new in each epoch, that puts rows of like length into the same step.

    It is a function of seed and epoch alone. The Trainer's own sampler for this draws from the global
    random state, so that a run resumed in mid-epoch sees some rows twice and others not at all.
    """

    lengths: list[int]
    batch: int
    """Rows per optimizer step, of all processes."""
    seed: int
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


def reached(lengths: list[int], batch: int, config: TrainConfig, steps: int) -> set[int]:
    """Which rows the first `steps` steps of a phase see, by place; all of them once an epoch is over."""
    if steps >= steps_of(len(lengths), batch, 1, config):
        return set(range(len(lengths)))
    rows = batch * config.accumulation * config.processes
    return set(list(LengthOrder(lengths, rows, config.seed, lambda: 0))[: steps * rows])


class SteadyLoop:
    """Mix-in for a Trainer: an interrupted run sees the rows in the order of an uninterrupted one."""

    args: Any
    state: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, rows = self.args, len(self.train_dataset)
        batches = math.ceil(math.ceil(rows / args.world_size) / args.train_batch_size)
        steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))

        def epoch() -> int:
            return self.state.global_step // steps

        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthOrder(list(self.train_dataset["length"]), batch, self.args.seed, epoch)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: a checkpoint is for this machine only."""
