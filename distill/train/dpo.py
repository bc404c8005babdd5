"""Preference training: TRL's DPOTrainer over pairs that are token ids already.

Owns the check that the reference is the policy the run starts from. DPO: Rafailov et al., arXiv 2305.18290; its
length-regularised form, where the margin gains `dpo_length_alpha` for each token by which the chosen answer is the
longer one: iLR-DPO, arXiv 2406.11817.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.train import fast
from distill.train.config import TrainConfig
from distill.train.loop import SteadyLoop, loop_settings, steps_of
from distill.train.progress import Progress, callback_class
from distill.train.render import Pair
from memory.errors import TrainingError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


SIDES = ("chosen_mask", "rejected_mask")


@functools.cache
def trainer_class() -> type:
    """DPOTrainer for ready token ids, whose frozen reference is gone once its figures are taken."""
    import torch
    from trl.trainer.dpo_trainer import DPOTrainer

    class PairTrainer(SteadyLoop, DPOTrainer):
        length_alpha: float = 0.0

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            policy: Any = self.model
            fast.compact_head(policy.get_base_model())
            measured = super()._precompute_ref_logps(dataset, name, batch_size)
            if "ref" in policy.peft_config:
                policy.delete_adapter("ref")
            return measured

        def _compute_loss(self, model: Any, inputs: dict, return_outputs: bool) -> Any:
            # A token of an answer counts like `length_alpha` nats of its margin: it is put into the reference,
            # because TRL has no term for it.
            if self.length_alpha:
                lengths = inputs["completion_mask"].sum(dim=1).chunk(2)
                shifted = {
                    name: inputs[name] - length * self.length_alpha / self.beta
                    for name, length in zip(("ref_chosen_logps", "ref_rejected_logps"), lengths, strict=True)
                }
                inputs = {**inputs, **shifted}
            return super()._compute_loss(model, inputs, return_outputs)

        def starting_loss(self) -> float:
            """The DPO loss of the first pairs as the policy is now, without the terms for SFT and for length."""
            policy: Any = self.model
            kinds, weights = self.loss_types, self.loss_weights
            self.loss_types, self.loss_weights = ["sigmoid"], [1.0]
            alpha, self.length_alpha = self.length_alpha, 0.0
            pairs = [self.train_dataset[i] for i in range(min(len(self.train_dataset), 8))]
            batch = self._prepare_inputs(self.data_collator(pairs))
            policy.eval()
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = float(self._compute_loss(policy, batch, return_outputs=False))
            policy.train()
            self.loss_types, self.loss_weights, self.length_alpha = kinds, weights, alpha
            self._metrics["eval"].clear()
            return loss

    return PairTrainer


def dpo_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    config: TrainConfig,
    folder: Path,
    progress: Progress,
    steps: int | None = None,
) -> Any:
    """The trainer for `pairs` against `model` as it is now, its checkpoints in `folder`; `steps` instead of all."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    pad = DataCollatorForPreference(pad_token_id=int(tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        padded = pad(batch)
        # TRL counts every token of an answer; a tool's result is not what the policy said.
        said = [[0] * len(r["prompt_ids"]) + r[side] for side in SIDES for r in batch]
        for row, mask in zip(padded["completion_mask"], said, strict=True):
            row[: len(mask)] = torch.tensor(mask)
        # Both halves of the batch: the chosen answers, then the rejected ones.
        padded["row_weight"] = torch.tensor([r["weight"] for r in batch] * 2, dtype=torch.float32)
        return padded

    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "weight", *SIDES)
    dataset = Dataset.from_dict(
        {**{name: [getattr(p, name) for p in pairs] for name in columns}, "length": [p.longest for p in pairs]}
    )
    planned = steps or steps_of(len(pairs), config.dpo_batch_size, config.dpo_epochs, config)
    with_sft = config.dpo_sft_weight > 0
    args = DPOConfig(
        per_device_train_batch_size=config.dpo_batch_size,
        num_train_epochs=config.dpo_epochs,
        learning_rate=config.dpo_learning_rate,
        beta=config.dpo_beta,
        loss_type=["sigmoid", "sft"] if with_sft else ["sigmoid"],
        loss_weights=[1.0, config.dpo_sft_weight] if with_sft else [1.0],
        precompute_ref_log_probs=True,
        max_steps=-1 if steps is None else steps,
        **loop_settings(config, folder, planned),
    )
    trainer = trainer_class()(
        model=model, processing_class=tokenizer, args=args, train_dataset=dataset, data_collator=collate
    )
    trainer.length_alpha = config.dpo_length_alpha
    trainer.add_callback(callback_class()(progress, "dpo", lambda: None))
    return trainer


def check_reference(loss: float, tolerance: float = 1e-3) -> None:
    """Raise TrainingError unless `loss`, taken before the first step, is ln 2.

    It is ln 2 exactly when policy and reference agree on every pair; float32 strays from it by less
    than 1e-5, bfloat16 by some thousandths (give it a tolerance of 0.02).
    """
    if not abs(loss - math.log(2)) <= tolerance:
        raise TrainingError(
            f"the DPO loss before the first step is {loss:.4f} instead of ln 2 = 0.6931: the reference is not the "
            "policy that training starts from; check the parent adapter"
        )
