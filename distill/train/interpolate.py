"""Interpolation toward the previous generation: how much of a night's change is kept, by what validation says.

WARP's last step (arXiv 2406.16768): weights on the line between where a round started and where it ended often keep
what was learned and forget less. The line is one of the weights W + scale * B @ A, not of the factors: averaging the
A and the B of two adapters adds products of one's A with the other's B, which belong to neither. So

    (1 - alpha) * scale_p * B_p @ A_p  +  alpha * scale_c * B_c @ A_c

is written as one product of stacked factors, whose rank is at most both ranks together, and brought to the rank that
the engine loads by a singular value decomposition. Without a cut it is exact; with one it is the nearest there is
(Eckart and Young), and how much was cut away is told.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.train.config import SFT_FILE, Interpolation, TrainConfig, TrainJob
from distill.train.progress import write_whole
from distill.train.render import Row, read_examples, render_all, render_row
from memory.errors import TrainingError, boundary
from memory.records import Example, ExampleKind, content_hash

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PARTS = (".lora_A.weight", ".lora_B.weight")


def apart(examples: Iterable[Example], config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """(to train on, to validate on): about `validation_share` of the tasks, all examples of one on the same side.

    Nothing is put aside without `interpolate`, nor when nothing would be left.
    """
    kept: list[Example] = []
    aside: list[Example] = []
    for example in examples:
        place = int(content_hash([config.seed, "validation", example.task_id])[:8], 16) / 0x1_0000_0000
        (aside if config.interpolate and place < config.validation_share else kept).append(example)
    return (kept, aside) if kept else (aside, [])


def interpolate(previous: Path | None, adapter: Path, alpha: float, folder: Path, *, most_rank: int | None) -> float:
    """Write the adapter that lies `alpha` of the way from `previous` (None: the base model) to `adapter`.

    Returns the share of the change's norm that the cut to `most_rank` lost, 0 without one. Raises TrainingError for
    adapters that are not plain LoRA.
    """
    from safetensors.torch import save_file

    new, new_config = _read(adapter)
    old, old_config = _read(previous) if previous is not None else ({}, new_config)
    whole = new_config["r"] + (old_config["r"] if old else 0)
    rank = min(whole, max(most_rank or whole, 1))
    merged: dict[str, Any] = {}
    lost = total = 0.0
    for name in sorted({*new, *old}):
        sides = []
        for factors, config, weight in ((old, old_config, 1 - alpha), (new, new_config, alpha)):
            if name in factors:
                down, up = factors[name]
                sides.append((down, up * (weight * config["lora_alpha"] / config["r"])))
        down, up, cut, norm = _product(sides, rank)
        lost, total = lost + cut**2, total + norm**2
        for part, value in zip(PARTS, (down, up), strict=True):
            merged[name + part] = value.contiguous()
    layers = [config["layers_to_transform"] for config in (old_config, new_config)]
    described = {
        **new_config,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({*old_config["target_modules"], *new_config["target_modules"]}),
        "layers_to_transform": sorted({*layers[0], *layers[1]}) if all(layers) else None,
    }
    half = folder.with_name(folder.name + ".half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    save_file(merged, half / WEIGHTS, metadata={"format": "pt"})
    (half / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)
    return (lost / total) ** 0.5 if total else 0.0


def validation_losses(model: Any, rows: dict[str, list[Row]]) -> dict[str, float]:
    """Workload -> the model's mean negative log-likelihood, in nats per labelled token, of its rows."""
    import torch

    losses: dict[str, float] = {}
    model.eval()
    for workload, members in sorted(rows.items()):
        said, tokens = 0.0, 0
        for row in members:
            ids = torch.tensor([row.input_ids], device=model.device)
            labels = torch.tensor([row.labels], device=model.device)
            with torch.no_grad():
                said += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * row.trained
            tokens += row.trained
        losses[workload] = said / tokens
    return losses


def choose(losses: dict[float, dict[str, float]]) -> float:
    """The candidate whose workloads' mean loss is least; of equals the one nearest to the previous generation.

    Each workload counts the same, so that a night of many tasks of one kind does not outvote what it forgets.
    """
    return min(losses, key=lambda alpha: (round(sum(losses[alpha].values()) / len(losses[alpha]), 6), alpha))


def _read(folder: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
    """(module -> its A and B in float64, the adapter's config)."""
    from safetensors.torch import load_file

    with boundary(TrainingError, f"{folder} holds no adapter to interpolate"):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    special = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
    names = {name.removesuffix(part) for name in tensors for part in PARTS if name.endswith(part)}
    if special or len(tensors) != 2 * len(names):
        why = ", ".join(special) or "weights other than lora_A and lora_B"
        raise TrainingError(f"the adapter in {folder} is not plain LoRA ({why}): it cannot be interpolated")
    return {name: (tensors[name + PARTS[0]].double(), tensors[name + PARTS[1]].double()) for name in names}, config


def _product(
    sides: Sequence[tuple[torch.Tensor, torch.Tensor]], rank: int
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """(A, B) of the given rank nearest to the sum of the sides' B @ A, the norm of what was cut, the whole norm."""
    import torch

    down, up = torch.cat([a for a, _ in sides]), torch.cat([b for _, b in sides], dim=1)
    # Both factors are thin: what lies between their orthogonal parts is a small square.
    left, core_left = torch.linalg.qr(up)
    right, core_right = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(core_left @ core_right.T)
    kept = values[:rank]
    root = kept.sqrt()
    size = len(kept)
    new_up = left.new_zeros(up.shape[0], rank)
    new_down = left.new_zeros(rank, down.shape[1])
    new_up[:, :size] = (left @ u[:, :size]) * root
    new_down[:size] = root[:, None] * (v[:size] @ right.T)
    return new_down.float(), new_up.float(), float(values[rank:].norm()), float(values.norm())


def toward_previous(job: TrainJob, config: TrainConfig, tokenizer: Any, adapter: Path) -> tuple[Path, Interpolation]:
    """The adapter folder that validation favours among `config.interpolate` and `adapter` itself, and the figures.

    What was chosen is kept in the work folder: a run that is gone on with chooses no second time.
    """
    told, folder = job.work_dir / "interpolated.json", job.work_dir / "interpolated-adapter"
    if told.is_file():
        chosen = Interpolation.model_validate_json(told.read_text(encoding="utf-8"))
        return (folder if folder.is_dir() else adapter), chosen
    rows = validation_rows(job, config, tokenizer)
    if not rows:
        return adapter, Interpolation(alpha=1.0, losses={}, lost=0.0)
    folders, lost = {1.0: adapter}, {1.0: 0.0}
    for alpha in sorted({*config.interpolate} - {1.0}):
        folders[alpha] = job.work_dir / f"alpha-{alpha}"
        lost[alpha] = interpolate(job.previous_adapter, adapter, alpha, folders[alpha], most_rank=job.most_rank)
    losses = _losses(job.base_model, folders, rows)
    alpha = choose(losses)
    shutil.rmtree(folder, ignore_errors=True)
    if alpha != 1.0:
        folders[alpha].rename(folder)
    chosen = Interpolation(alpha=alpha, losses={str(a): found for a, found in losses.items()}, lost=lost[alpha])
    write_whole(told, chosen.model_dump_json())
    return (folder if alpha != 1.0 else adapter), chosen


def validation_rows(job: TrainJob, config: TrainConfig, tokenizer: Any) -> dict[str, list[Row]]:
    """Workload -> the rows that `apart` kept from training."""
    examples = read_examples(job.dataset_dir / SFT_FILE, ExampleKind.SFT)
    rows: dict[str, list[Row]] = {}
    for example, row in render_all(apart(examples, config)[1], render_row, tokenizer)[0]:
        if len(row.input_ids) <= config.max_length:
            rows.setdefault(example.workload, []).append(row)
    return rows


def _losses(base: Path, folders: dict[float, Path], rows: dict[str, list[Row]]) -> dict[float, dict[str, float]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    loaded = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16 if gpu else torch.float32)
    found: dict[float, dict[str, float]] = {}
    model: Any = None
    for alpha, folder in folders.items():
        name = f"alpha_{len(found)}"
        if model is None:
            model = PeftModel.from_pretrained(loaded, str(folder), adapter_name=name)
            model = model.to("cuda" if gpu else "cpu")
        else:
            model.load_adapter(str(folder), adapter_name=name)
        model.set_adapter(name)
        found[alpha] = validation_losses(model, rows)
    return found
