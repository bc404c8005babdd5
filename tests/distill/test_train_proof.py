"""What the trainer writes down of its adapter, for the engine to be measured by."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.train.config import TrainConfig, TrainJob
from distill.train.job import train
from distill.train.proof import PROOF, WEIGHTS, read_proof, sha256_of, write_proof
from memory.errors import EngineError, TrainingError
from tests.distill.train_fixtures import make_base, sums, write_dataset


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    folder = tmp_path_factory.mktemp("proof")
    config = TrainConfig(layers=2, batch_size=4, rank=4, threads=1, learning_rate=1e-2)
    data = write_dataset(folder / "data", sums(8))
    made = TrainJob(
        dataset_dir=data, base_model=make_base(folder / "base"), out_dir=folder / "out" / "adapter", config=config
    )
    train(made)
    return made


def logprobs(model: Any, ids: list[int]) -> list[float]:
    import torch

    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(scores[i, token]) for i, token in enumerate(ids[1:])]


def test_a_run_leaves_the_log_probs_of_what_it_trained_and_of_its_base(job: TrainJob) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    proof = read_proof(job.out_dir)
    assert proof is not None
    assert proof.dtype == "float32"
    base: Any = AutoModelForCausalLM.from_pretrained(job.base_model, dtype=torch.float32)
    plain = [logprobs(base, row.token_ids) for row in proof.rows]
    merged: Any = PeftModel.from_pretrained(base, str(job.out_dir)).merge_and_unload()  # pyright: ignore
    for row, expected in zip(proof.rows, plain, strict=True):
        assert row.base == pytest.approx(expected, abs=1e-4)
        assert row.adapted == pytest.approx(logprobs(merged, row.token_ids), abs=1e-3)
        assert max(abs(a - b) for a, b in zip(row.adapted, row.base, strict=True)) > 0.01


def test_the_proof_is_of_just_these_weights(job: TrainJob, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(job.out_dir, copy)
    proof = read_proof(copy)
    assert proof is not None
    assert proof.weights_sha256 == sha256_of(copy / WEIGHTS)
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes() + b" ")
    with pytest.raises(EngineError, match="other weights"):
        read_proof(copy)
    (copy / PROOF).unlink()
    assert read_proof(copy) is None


def test_weights_that_give_no_numbers_end_the_run_instead_of_being_served(job: TrainJob, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(job.out_dir, broken)
    save_file({name: weight * float("nan") for name, weight in load_file(broken / WEIGHTS).items()}, broken / WEIGHTS)
    with pytest.raises(TrainingError, match="diverged"):
        write_proof(job.base_model, broken)
