"""Supervised fine-tuning: TRL's SFTTrainer over rows that are token ids already.

Owns the weighted loss and the profiles. What is trained on is
`render`'s, the accelerated forward is `fast`'s.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.train import fast
from distill.train.config import TrainConfig
from distill.train.loop import SteadyLoop, loop_settings, steps_of
from distill.train.progress import Progress, callback_class
from distill.train.render import Row

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@functools.cache
def trainer_class() -> type:
    """SFTTrainer with a weight per row and, where a cache is given, without the frozen blocks."""
    import torch
    from trl.trainer.sft_trainer import SFTTrainer

    class RowTrainer(SteadyLoop, SFTTrainer):
        hidden: fast.HiddenCache | None = None
        first_block: int = 0

        def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Sum of weight * negative log-likelihood, per labelled token of the whole step."""
            weights, rows = inputs.pop("weight"), inputs.pop("row").tolist()
            if self.hidden is not None:
                ids, mask = inputs["input_ids"], inputs["attention_mask"]
                inputs["entering"] = self.hidden.fetch(rows, ids, mask, self._enter)
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
            loss = -(outputs.log_probs.sum(dim=1) * weights).sum() / torch.as_tensor(count).clamp(min=1)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                # The count is over all processes, whose gradients are then averaged.
                loss = loss * self.accelerator.num_processes
            return (loss, outputs) if return_outputs else loss

        def _enter(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            backbone = self.accelerator.unwrap_model(self.model).get_base_model().base_model
            with torch.no_grad(), self.accelerator.autocast():
                hidden = backbone.embed_tokens(input_ids)
                return fast.run_blocks(backbone, hidden, attention_mask, range(self.first_block))

    return RowTrainer


def sft_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    config: TrainConfig,
    folder: Path,
    progress: Progress,
    steps: int | None = None,
) -> Any:
    """The trainer for `rows`, its checkpoints in `folder`; `train(resume_from_checkpoint=…)` runs it.

    `steps`: that many instead of all epochs. `config.profile` must be one that the architecture can do
    (`fast.skippable` for `upper-cached`).
    """
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad = DataCollatorForLanguageModeling(pad_token_id=int(tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        padded = pad([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in batch])
        padded["weight"] = torch.tensor([r["weight"] for r in batch], dtype=torch.float32)
        padded["row"] = torch.tensor([r["row"] for r in batch])
        return padded

    dataset = Dataset.from_dict(
        {
            "input_ids": [r.input_ids for r in rows],
            "labels": [r.labels for r in rows],
            "weight": [r.weight for r in rows],
            "row": list(range(len(rows))),
            "length": [len(r.input_ids) for r in rows],
        }
    )
    args = SFTConfig(
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_steps=-1 if steps is None else steps,
        **loop_settings(config, folder, steps or steps_of(len(rows), config.batch_size, config.epochs, config)),
    )
    trainer = trainer_class()(
        model=model, processing_class=tokenizer, args=args, train_dataset=dataset, data_collator=collate
    )
    if config.profile != "standard":
        accelerate_forward(trainer, rows, config, folder)

    def cached() -> dict[str, Any] | None:
        kept = trainer.hidden
        return {"rows": len(rows), "bytes": kept.bytes} if kept is not None and not kept.missing else None

    trainer.add_callback(callback_class()(progress, "sft", cached))
    return trainer


def accelerate_forward(trainer: Any, rows: list[Row], config: TrainConfig, folder: Path) -> None:
    """Give an SFT trainer the forward of its profile, `upper` or `upper-cached`."""
    base = trainer.model.get_base_model()
    fast.compact_head(base)
    trainer.first_block = fast.first_trained_block(trainer.model)
    if config.profile == "upper-cached" and trainer.first_block > 0:
        fast.skip_lower(base, trainer.first_block)
        lengths = [len(r.input_ids) for r in rows]
        path = folder / f"hidden-{trainer.args.process_index}.bin"
        width, limit = base.config.hidden_size, config.cache_ram_mb * 2**20
        trainer.hidden = fast.HiddenCache(lengths, width, base.dtype, limit, path)
