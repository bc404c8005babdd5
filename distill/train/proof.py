"""The trainer's half of the proof of serving: what the finished adapter says of a few fixed texts.

PEFT's log-probs of the probes go into the adapter's folder beside the weights. An engine that serves the adapter
must come to the same figures (`serve.adapters`): it may leave weights out, scale them otherwise or answer from
another adapter's cache, and look healthy all the while.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from distill.train.progress import write_whole
from memory.errors import EngineError, TrainingError, boundary

PROOF = "proof.json"
WEIGHTS = "adapter_model.safetensors"
MAX_TOKENS = 64

PROBES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    "Action: calc(3 * (4 + 5))\nObservation: 27\nAction: finish(27)",
)


class ProofRow(BaseModel):
    """One probe: the log-probs, in nats, of every token but the first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ids: list[int]
    base: list[float]
    adapted: list[float]


class Proof(BaseModel):
    """What PEFT says of the probes, with the adapter and without."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights_sha256: str
    """Of the adapter's weights, so that nobody reads the proof of other ones."""
    dtype: str
    """What was computed in."""
    rows: list[ProofRow]


def write_proof(base: Path, folder: Path) -> None:
    """Compute the proof of the adapter in `folder` from its files and write it beside them.

    Raises TrainingError when the adapter gives no finite log-probs: such weights are broken.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = _dtype(base)
    with boundary(TrainingError, f"the adapter in {folder} cannot be loaded again"):
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        loaded = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype))
        model: Any = PeftModel.from_pretrained(loaded, str(folder))
    model = model.to(_device(model)).eval()
    probes = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in PROBES]
    adapted = [_logprobs(model, ids) for ids in probes]
    with model.disable_adapter():
        plain = [_logprobs(model, ids) for ids in probes]
    if not all(math.isfinite(value) for values in adapted for value in values):
        raise TrainingError("the trained adapter gives no finite log-probs: training diverged, lower the learning rate")
    rows = [ProofRow(token_ids=i, base=b, adapted=a) for i, b, a in zip(probes, plain, adapted, strict=True)]
    proof = Proof(weights_sha256=sha256_of(folder / WEIGHTS), dtype=dtype, rows=rows)
    write_whole(folder / PROOF, proof.model_dump_json())


def read_proof(folder: Path) -> Proof | None:
    """The proof in an adapter's folder; None when it was trained before there were any.

    Raises EngineError when it cannot be read, or belongs to other weights.
    """
    path = folder / PROOF
    if not path.is_file():
        return None
    try:
        proof = Proof.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError) as exc:
        raise EngineError(f"{path} cannot be read as a proof of serving: {type(exc).__name__}") from exc
    if proof.weights_sha256 != sha256_of(folder / WEIGHTS):
        raise EngineError(f"{path} belongs to other weights than those beside it: the adapter is not served")
    return proof


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dtype(base: Path) -> str:
    """float32, unless that would not fit into this machine's memory: a night must not die of its own proof."""
    import psutil

    needed = 2 * sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return "float32" if psutil.virtual_memory().available > 1.5 * needed else "bfloat16"


def _device(model: Any) -> str:
    """The GPU when the model fits there, beside whatever else lives on it."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.empty_cache()
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return "cuda" if torch.cuda.mem_get_info()[0] > 1.2 * needed else "cpu"


def _logprobs(model: Any, ids: list[int]) -> list[float]:
    import torch

    with torch.no_grad():
        tokens = torch.tensor([ids], device=model.device)
        scores = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
        return scores.gather(1, tokens[0, 1:, None])[:, 0].tolist()
