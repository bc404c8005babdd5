"""How many GPUs are trained on: the command line that starts a process for each, as accelerate itself reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.train import launch
from distill.train.config import TrainConfig, TrainJob
from memory.errors import TrainingError

PYTHON = Path("/env/bin/python")


def job(processes: int) -> TrainJob:
    config = TrainConfig(processes=processes, threads=8)
    return TrainJob(dataset_dir=Path("/d"), base_model=Path("/b"), out_dir=Path("/o"), config=config)


def test_several_processes_are_started_by_accelerate_with_the_jobs_own_arguments(monkeypatch):
    from accelerate.commands.launch import launch_command_parser

    monkeypatch.setattr("distill.train.launch.shutil.which", lambda _tool: "/usr/bin/nvidia-smi")
    command = launch._command(job(4), Path("/o.work/job.json"), PYTHON)
    assert command[:3] == [str(PYTHON), "-m", "accelerate.commands.launch"]
    read = launch_command_parser().parse_args(command[3:])
    assert (read.num_processes, read.num_machines, read.multi_gpu) == (4, 1, True)
    assert (read.module, read.training_script) == (True, "distill.train")
    assert read.training_script_args[0] == "/o.work/job.json"
    assert "--parent" in read.training_script_args
    assert launch._environment(job(4))["OMP_NUM_THREADS"] == "2"


def test_one_process_needs_no_launcher():
    assert launch._command(job(1), Path("/o.work/job.json"), PYTHON)[:3] == [str(PYTHON), "-m", "distill.train"]


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, "0"), ("2,3", "2"), ("MIG-a7, MIG-b8", "MIG-a7"), ("1", "1"), ("", ""), ("-1", "-1")]
)
def test_one_process_sees_the_first_gpu_only_and_several_see_all(monkeypatch, visible, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch._environment(job(1))["CUDA_VISIBLE_DEVICES"] == seen
    assert launch._environment(job(2)).get("CUDA_VISIBLE_DEVICES") == visible


def test_without_gpus_several_processes_are_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr("distill.train.launch.shutil.which", lambda _tool: None)
    with pytest.raises(TrainingError, match="set processes to 1"):
        launch._command(job(2), Path("/o.work/job.json"), PYTHON)
