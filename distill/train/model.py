"""The policy: a base model with a LoRA adapter, as loaded, fresh or written to a folder.

Owns which weights are trained and what an adapter folder holds (PEFT's format, which vLLM loads).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.train.config import TrainConfig
from memory.errors import TrainingError, boundary

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token. Raises TrainingError without a chat template."""
    from transformers import AutoTokenizer

    with boundary(TrainingError, f"{base} holds no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base)
    if not tokenizer.chat_template:
        raise TrainingError(f"the tokenizer in {base} has no chat template; serve and train an instruct model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(base: Path, adapter: Path | None, config: TrainConfig, pad_token_id: int) -> PeftModel:
    """The base model with `adapter` made trainable, or with a fresh one that changes nothing yet.

    bfloat16 on a GPU, float32 on a CPU; the adapter's own weights are float32 on both.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(config.seed)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with boundary(TrainingError, f"{base} holds no usable model"):
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    model.config.pad_token_id = pad_token_id
    if adapter is not None:
        with boundary(TrainingError, f"{adapter} holds no adapter for {base}"):
            return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    prefix, blocks = _blocks(model)
    names = {name.rpartition(".")[2] for name, part in blocks.named_modules() if isinstance(part, torch.nn.Linear)}
    if not names:
        raise TrainingError(f"{type(model).__name__} has no linear layers in its blocks, so LoRA has nothing to adapt")
    chosen = None
    if config.profile != "standard":
        chosen = list(range(max(0, len(blocks) - config.layers), len(blocks)))
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=sorted(names),
        layers_to_transform=chosen,
        layers_pattern=prefix if chosen is not None else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)  # pyright: ignore[reportReturnType]


def _blocks(model: Any) -> tuple[str, Any]:
    """The name and the list of the decoder blocks: the longest list of modules below the model."""
    import torch

    lists = [(n.rpartition(".")[2], m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise TrainingError(f"{type(model).__name__} has no list of decoder blocks, so it cannot be trained here")
    return max(lists, key=lambda item: len(item[1]))


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter into `folder`, which appears at once and complete, or not at all."""
    half = folder.with_name(folder.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    model.save_pretrained(str(half), selected_adapters=["default"], save_embedding_layers=False)
    (half / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)
