"""The accelerated forward: the language-model head at loss tokens only, frozen blocks only once per row.

Owns two patches of a loaded model and the cache of hidden states. Both keep TRL's contract
(`model(..., labels=, fused_lm_head=True)` gives per-token log-probabilities), so the trainers on top
stay TRL's and the loss stays the same. Owns no training loop.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SKIPPABLE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures whose blocks are known to need nothing but hidden states, mask and rotary positions."""


def first_trained_block(model: torch.nn.Module) -> int:
    """Index of the lowest decoder block with a trainable weight; 0 when one lies below the blocks."""
    indices = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            found = re.search(r"\.layers\.(\d+)\.", name)
            indices.append(int(found.group(1)) if found else 0)
    return min(indices, default=0)


def skippable(model: Any) -> bool:
    """Whether `skip_lower` knows this causal language model (without any adapter around it)."""
    config = model.config
    windows = set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
    sliding = config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None
    random = float(getattr(config, "attention_dropout", 0.0) or 0.0) > 0.0
    return config.model_type in SKIPPABLE and not (windows or sliding or random)


def run_blocks(backbone: Any, hidden: torch.Tensor, attention_mask: torch.Tensor, blocks: range) -> torch.Tensor:
    """Hidden states (rows, tokens, width) after the given decoder blocks; rows are padded on the right."""
    import torch
    from transformers.masking_utils import create_causal_mask

    positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    mask = create_causal_mask(
        config=backbone.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=positions,
    )
    rotary = backbone.rotary_emb(hidden, position_ids=positions)
    for index in blocks:
        hidden = backbone.layers[index](
            hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False
        )
    return hidden


def skip_lower(model: Any, first: int) -> None:
    """Let the model start at block `first` when it is given `entering`, the hidden states that enter it."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    backbone = model.base_model
    whole = backbone.forward

    def forward(*args: Any, entering: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if entering is None:
            return whole(*args, **kwargs)
        blocks = range(first, len(backbone.layers))
        hidden = run_blocks(backbone, entering, kwargs["attention_mask"], blocks)
        return BaseModelOutputWithPast(last_hidden_state=backbone.norm(hidden))  # pyright: ignore[reportArgumentType]

    backbone.forward = forward


def compact_head(model: Any) -> None:
    """Run the language-model head at loss tokens only, and honour `row_weight`.

    TRL 1.16 does the first on GPUs; on a CPU it scores every position, which for a small model with a
    large vocabulary is most of the work. `row_weight` (one figure per row) scales each row's gradient
    and leaves its value alone, so losses that are sums over rows become weighted whatever their form.
    Call it after TRL has put its own fused head in place.
    """
    fused = model.forward

    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        row_weight: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            return fused(*args, labels=labels, **kwargs)
        if labels.device.type == "cpu" and _plain_head(model):
            outputs = _score(model, labels, *args, **kwargs)
        else:
            outputs = fused(*args, fused_lm_head=True, labels=labels, **kwargs)
        if row_weight is not None:
            scored = outputs.log_probs
            outputs.log_probs = scored + (row_weight.unsqueeze(1) - 1.0) * (scored - scored.detach())
        return outputs

    model.forward = forward


def _plain_head(model: Any) -> bool:
    """Whether logits are just the head's output: no scaling, no soft cap, no router."""
    config = model.config
    scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    routed = getattr(config, "output_router_logits", False)
    return not routed and all(getattr(config, name, None) is None for name in scaled)


def _score(model: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """TRL's per-token figures of the next-token labels, computed at labelled positions only."""
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    kwargs["use_cache"] = False
    hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    mask = labels != -100
    logits = model.get_output_embeddings()(hidden[mask]).float()
    targets = labels[mask]
    chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    normaliser = torch.logsumexp(logits, dim=1)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    with torch.no_grad():
        entropy = normaliser - (torch.softmax(logits, dim=1) * logits).sum(dim=1)
        mean, top = logits.mean(dim=1), logits.argmax(dim=1) == targets
    return FusedCausalLMOutput(
        log_probs=spread(chosen - normaliser),  # pyright: ignore[reportArgumentType]
        entropy=spread(entropy),  # pyright: ignore[reportArgumentType]
        mean_logits=spread(mean),  # pyright: ignore[reportArgumentType]
        is_top1=spread(top),  # pyright: ignore[reportArgumentType]
        label_mask=mask,  # pyright: ignore[reportArgumentType]
    )


class HiddenCache:
    """Hidden states that enter the first trained block, of every row, each computed when first needed.

    The blocks below are frozen, so they stay true for the whole run. One flat buffer (tokens, width)
    in RAM, or in a memory-mapped file at `path` when it exceeds `ram_bytes`.
    """

    def __init__(self, lengths: list[int], width: int, dtype: torch.dtype, ram_bytes: int, path: Path) -> None:
        import torch

        self.starts = [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
        self.bytes = self.starts[-1] * width * torch.finfo(dtype).bits // 8
        self.missing = set(range(len(lengths)))
        if self.bytes <= ram_bytes:
            self.buffer = torch.empty(self.starts[-1], width, dtype=dtype)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            count = self.starts[-1] * width
            self.buffer = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(-1, width)

    def fetch(
        self,
        rows: list[int],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Hidden states (rows, tokens, width) of a padded batch; `compute` gives those of unseen rows."""
        fresh = [i for i, row in enumerate(rows) if row in self.missing]
        if fresh:
            hidden = compute(input_ids[fresh], attention_mask[fresh]).to("cpu", self.buffer.dtype)
            for i, states in zip(fresh, hidden, strict=True):
                start, end = self._span(rows[i])
                self.buffer[start:end] = states[: end - start]
                self.missing.discard(rows[i])
        batch = self.buffer.new_zeros(len(rows), input_ids.shape[1], self.buffer.shape[1])
        for i, row in enumerate(rows):
            start, end = self._span(row)
            batch[i, : end - start] = self.buffer[start:end]
        return batch.to(input_ids.device)

    def _span(self, row: int) -> tuple[int, int]:
        return self.starts[row], self.starts[row + 1]
