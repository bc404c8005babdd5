"""Between two generations: the weights are on the line, the candidate is chosen on validation, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.train.config import TrainConfig
from distill.train.interpolate import CONFIG, WEIGHTS, apart, choose, interpolate
from distill.train.job import train
from memory.errors import TrainingError
from memory.records import Example
from tests.distill.test_train_loss import trained_adapter
from tests.distill.test_train_run import make_job
from tests.distill.train_fixtures import sums

MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"


def adapter(folder: Path, seed: int, rank: int = 3, alpha: int = 6, layers: tuple[int, ...] = (0, 1), **config) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {".lora_A.weight": (rank, 12), ".lora_B.weight": (10, rank)}
    weights = {
        MODULE.format(layer) + part: torch.randn(*shape, generator=generator)
        for layer in layers
        for part, shape in shapes.items()
    }
    save_file(weights, folder / WEIGHTS)
    described = {"r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "layers_to_transform": list(layers)}
    (folder / CONFIG).write_text(json.dumps({**described, **config}))
    return folder


def change(folder: Path, layer: int) -> Any:
    """What the adapter adds to a layer's weights."""
    from safetensors.torch import load_file

    config, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    name = MODULE.format(layer)
    up, down = weights.get(f"{name}.lora_B.weight"), weights.get(f"{name}.lora_A.weight")
    return 0 if up is None else config["lora_alpha"] / config["r"] * up @ down


def test_the_weights_lie_on_the_line_between_both_adapters(tmp_path):
    import torch

    old, new = adapter(tmp_path / "old", 1, rank=2, alpha=8), adapter(tmp_path / "new", 2)
    lost = interpolate(old, new, 0.3, tmp_path / "out", most_rank=16)
    assert lost == pytest.approx(0.0, abs=1e-9)
    for layer in (0, 1):
        expected = 0.7 * change(old, layer) + 0.3 * change(new, layer)
        torch.testing.assert_close(change(tmp_path / "out", layer), expected, atol=1e-5, rtol=1e-5)


def test_layers_that_only_one_of_them_has_are_kept_for_its_part(tmp_path):
    import torch

    old, new = adapter(tmp_path / "old", 1, layers=(0, 1)), adapter(tmp_path / "new", 2, layers=(1, 2))
    interpolate(old, new, 0.25, tmp_path / "out", most_rank=None)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["layers_to_transform"] == [0, 1, 2]
    for layer in (0, 1, 2):
        expected = 0.75 * change(old, layer) + 0.25 * change(new, layer)
        torch.testing.assert_close(change(tmp_path / "out", layer), expected, atol=1e-5, rtol=1e-5)


def test_toward_the_base_model_the_change_is_scaled(tmp_path):
    import torch

    new = adapter(tmp_path / "new", 2)
    assert interpolate(None, new, 0.4, tmp_path / "out", most_rank=3) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(change(tmp_path / "out", 1), 0.4 * change(new, 1), atol=1e-5, rtol=1e-5)


def test_above_the_engines_rank_it_is_the_nearest_one_and_says_what_was_lost(tmp_path):
    import torch

    old, new = adapter(tmp_path / "old", 1, layers=(0,)), adapter(tmp_path / "new", 2, layers=(0,))
    lost = interpolate(old, new, 0.5, tmp_path / "out", most_rank=4)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 4
    exact = 0.5 * change(old, 0) + 0.5 * change(new, 0)
    values = torch.linalg.svdvals(exact)
    assert lost == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)
    assert float((change(tmp_path / "out", 0) - exact).norm()) == pytest.approx(float(values[4:].norm()), rel=1e-4)


def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path):
    new = adapter(tmp_path / "new", 2, use_dora=True)
    with pytest.raises(TrainingError, match="not plain LoRA"):
        interpolate(None, new, 0.5, tmp_path / "out", most_rank=None)
    assert not (tmp_path / "out").exists()


def test_every_workload_counts_the_same_and_of_equals_the_nearest_to_the_previous_one_is_kept():
    assert choose({0.5: {"sums": 1.0, "general": 1.0}, 1.0: {"sums": 0.5, "general": 1.6}}) == 0.5
    assert choose({0.5: {"sums": 1.0}, 1.0: {"sums": 0.9}}) == 1.0
    assert choose({1.0: {"sums": 1.0}, 0.5: {"sums": 1.0}}) == 0.5


def questions(count: int) -> list[Example]:
    """Two examples of each task."""
    pairs = [(n, example) for n, example in enumerate(sums(2 * count))]
    return [example.model_copy(update={"task_id": f"task_{n // 2}"}) for n, example in pairs]


def test_a_tasks_examples_are_all_trained_on_or_all_kept_for_validation():
    config = TrainConfig(interpolate=(0.5,), validation_share=0.3)
    material = questions(40)
    kept, aside = apart(material, config)
    assert 10 < len(aside) < 40
    assert not {e.task_id for e in kept} & {e.task_id for e in aside}
    assert apart(material[::-1], config)[1] == aside[::-1]
    assert apart(material, TrainConfig()) == (material, [])


def test_a_run_keeps_the_candidate_that_validation_favours_and_chooses_only_once(tmp_path, monkeypatch):
    job = make_job(tmp_path, questions(8), epochs=1, interpolate=(0.5,), validation_share=0.4)
    previous = trained_adapter(job.base_model, tmp_path / "previous")
    job = job.model_copy(update={"previous_adapter": previous, "most_rank": 8})
    with monkeypatch.context() as patch:
        patch.setattr("distill.train.job._publish", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            train(job)
    monkeypatch.setattr("distill.train.interpolate.interpolate", None)
    result = train(job)
    chosen = result.interpolation
    assert chosen is not None
    assert set(chosen.losses) == {"0.5", "1.0"}
    assert chosen.alpha == choose({float(alpha): losses for alpha, losses in chosen.losses.items()})
    assert result.sft_rows < 16
    rank = json.loads((job.out_dir / CONFIG).read_text())["r"]
    assert rank == (4 if chosen.alpha == 1.0 else 8)
