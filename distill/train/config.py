"""What a training run is told and what it tells back: `TrainConfig`, `TrainJob`, `TrainResult`.

Owns the settings' meaning and ranges and the names of a run's files. Imports nothing heavy: the
service reads these records without torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

RESULT = "result.json"
"""The file that is written last: an `out_dir` that holds it is a finished run."""

SFT_FILE = "sft.jsonl"
DPO_FILE = "dpo.jsonl"

Alpha = Annotated[float, Field(gt=0.0, le=1.0)]
Profile = Literal["standard", "upper", "upper-cached"]


class TrainConfig(BaseModel):
    """How to train. The defaults are those that taught a 135M model new skills in one night on two CPU cores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: Profile = "upper-cached"
    """`standard`: LoRA on every linear layer of all blocks. `upper`: only on the last `layers` blocks, and
    the language-model head runs at loss tokens only. `upper-cached`: moreover the hidden states that enter
    the first trained block are computed once per row and kept."""
    layers: int = Field(default=16, ge=1)
    """Trained blocks, counted from the top (the `upper` profiles). Of SmolLM2-135M's 30: ten lose 18 points of held-out
    success to sixteen, and more than sixteen gain nothing (`bench train`)."""
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    learning_rate: float = Field(default=1e-3, gt=0.0)
    epochs: int = Field(default=2, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Rows per step and process."""
    accumulation: int = Field(default=1, ge=1)
    """Batches per optimizer step."""
    warmup_steps: int = Field(default=2, ge=0)
    clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_length: int = Field(default=2048, ge=16)
    """Tokens. A longer row is left out, never cut: a cut answer teaches to stop in mid-sentence."""
    seed: int = 0

    dpo_epochs: int = Field(default=2, ge=0)
    """0 = no DPO, whatever the dataset holds."""
    dpo_learning_rate: float = Field(default=2e-4, gt=0.0)
    dpo_batch_size: int = Field(default=4, ge=1)
    dpo_beta: float = Field(default=0.1, gt=0.0)
    dpo_sft_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen answers' own SFT loss beside DPO's (RPO, arXiv 2404.19733); 0 = none."""
    dpo_length_alpha: float = Field(default=0.0, ge=0.0)
    """Margin granted per token by which the chosen answer is longer, so that preferring length teaches little
    (iLR-DPO, arXiv 2406.11817); 0 = plain DPO. To be tuned from about 0.01."""

    interpolate: tuple[Alpha, ...] = ()
    """How far from the previous generation to the trained adapter the result may lie, 1 being the adapter itself
    (WARP, arXiv 2406.16768): the candidate with the least loss on `validation_share` of the tasks is kept.
    Empty: the adapter as it was trained, on all tasks."""
    validation_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the SFT tasks that is kept from training to choose among `interpolate`."""

    checkpoint_steps: int = Field(default=20, ge=0)
    """Steps between checkpoints; 0 = none."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    processes: int = Field(default=1, ge=1)
    """Training processes on this machine, one per GPU; above 1 they are started by `accelerate launch`."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads for all processes together; None = every core this process may use."""
    cache_ram_mb: int = Field(default=2048, ge=0)
    """Larger caches of hidden states become a memory-mapped file in the run's work folder."""


class TrainJob(BaseModel):
    """One run: what to learn from, on what, and where the adapter goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset_dir: Path
    """Holds `sft.jsonl` and/or `dpo.jsonl`, one `memory.records.Example` per line."""
    base_model: Path
    """Folder of the base model in Hugging Face format, tokenizer and chat template included."""
    parent_adapter: Path | None = None
    """The adapter to go on from; None = start from the base model."""
    previous_adapter: Path | None = None
    """The generation to interpolate toward; None = the base model."""
    most_rank: int | None = None
    """Largest rank that the engine loads: an interpolation above it is cut to it. None = none is."""
    out_dir: Path
    """Appears at once and complete, when the run is over."""
    config: TrainConfig = TrainConfig()
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens to train on, of all phases and epochs; fewer steps are planned to fit. None = as many as there are."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Wall time; the step during which it ends is the last one, and what was learned by then is the result."""

    @property
    def work_dir(self) -> Path:
        """Lock, job file, log and checkpoints of a run that is not over."""
        return self.out_dir.with_name(self.out_dir.name + ".work")

    @property
    def progress_path(self) -> Path:
        """The run's events, one JSON object per line."""
        return self.out_dir.with_name(self.out_dir.name + ".progress.jsonl")

    @property
    def result_path(self) -> Path:
        """Where the result of a finished run lies."""
        return self.out_dir / RESULT


class Interpolation(BaseModel):
    """What was chosen between the previous generation (0) and the trained adapter (1)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float
    losses: dict[str, dict[str, float]]
    """Candidate -> workload -> mean negative log-likelihood on the validation rows, in nats per token; {} = there
    were none."""
    lost: float
    """Share of the change's norm that the cut to the engine's rank took from the chosen one."""


class TrainResult(BaseModel):
    """What came of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter_dir: Path
    profile: Profile
    """The profile really used: an unknown architecture turns `upper-cached` into `upper`."""
    note: str = ""
    sft_rows: int
    dpo_pairs: int
    too_long: int
    """Rows and pairs left out because they exceed `max_length`."""
    unrendered: int = 0
    """Those left out because the chat template cannot render them; `note` says why."""
    served_prompts: int = 0
    """Prompts as they were served that the trained ones were compared with (`distill.train.served`)."""
    unreached: list[str] = []
    """Sources of the examples that a shortened run never saw, and of none that it saw."""
    losses: dict[str, list[float]]
    """One figure per step and phase (`sft`, `dpo`)."""
    tokens: int
    """Tokens run through the model, all epochs, without padding."""
    planned_tokens: int | None = None
    """What they would have been without a budget; None of a trainer that did not say."""
    trained_tokens: int
    """Those of them that the loss fell on."""
    mask_share: float
    """trained_tokens / tokens, in 0..1."""
    seconds: float
    """Wall time of the whole run, interrupted attempts included up to their last checkpoint."""
    tokens_per_s: float
    """Speed of the training loops of the attempt that finished."""
    reference_loss: float | None
    """DPO loss before its first step, ln 2 when the reference is the policy itself; None without DPO."""
    interpolation: Interpolation | None = None
    config: TrainConfig


def finished(job: TrainJob) -> TrainResult | None:
    """The result of a run that is over, None for one that is not."""
    if not job.result_path.is_file():
        return None
    return TrainResult.model_validate_json(job.result_path.read_text())
