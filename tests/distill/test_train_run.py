from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distill.train.__main__ import main
from distill.train.config import TrainConfig, TrainJob, finished
from distill.train.job import train
from distill.train.launch import run
from distill.train.progress import last_checkpoint
from memory.errors import TrainingError
from tests.distill.train_fixtures import make_base, preferences, say, sft, sums, write_dataset

PYTHON = Path(sys.executable)


def make_job(tmp_path: Path, examples: list, name: str = "adapter", parent: Path | None = None, **settings) -> TrainJob:
    base = tmp_path / "base"
    if not base.exists():
        make_base(base)
    config = TrainConfig(**{"layers": 2, "batch_size": 4, "rank": 4, "threads": 1, **settings})
    dataset = write_dataset(tmp_path / f"{name}-data", examples)
    return TrainJob(
        dataset_dir=dataset, base_model=base, parent_adapter=parent, out_dir=tmp_path / "out" / name, config=config
    )


def events_of(job: TrainJob, kind: str | None = None) -> list[dict[str, Any]]:
    lines = job.progress_path.read_text().splitlines() if job.progress_path.exists() else []
    return [e for e in map(json.loads, lines) if kind is None or e["event"] == kind]


def tensor_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_a_run_leaves_an_adapter_of_the_upper_blocks_a_result_and_its_progress(tmp_path):
    job = make_job(tmp_path, sums(8) + preferences(4), epochs=4, learning_rate=1e-2)
    result = train(job)
    assert finished(job) == result
    first_epoch, last_epoch = result.losses["sft"][:2], result.losses["sft"][-2:]
    assert sum(last_epoch) < sum(first_epoch)
    assert result.reference_loss == pytest.approx(0.6931, abs=1e-3)
    assert 0 < result.mask_share == result.trained_tokens / result.tokens < 1
    described = json.loads((job.out_dir / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(job.base_model)
    assert all(".layers.2." in name or ".layers.3." in name for name in tensor_names(job.out_dir))
    assert not (job.out_dir / "ref").exists()
    steps = events_of(job, "step")
    assert [s["step"] for s in steps] == list(range(1, 8 + 2 + 1))  # SFT, then DPO
    assert steps[-1]["tokens"] == result.tokens
    assert [e["event"] for e in events_of(job)][:1] == ["start"]
    assert [e["event"] for e in events_of(job)][-1] == "done"
    assert len(events_of(job, "cache")) == 1


def test_a_finished_run_is_not_made_again(tmp_path):
    job = make_job(tmp_path, sums(4), epochs=1)
    first = train(job)
    before = events_of(job)
    assert run(job, Path("/no/such/python"), print) == first
    assert events_of(job) == before


def test_a_run_goes_on_from_its_parent_adapter(tmp_path):
    parent = train(make_job(tmp_path, sums(8), "parent", batch_size=8, epochs=30, learning_rate=1e-2))
    child = train(make_job(tmp_path, sums(8), "child", parent=parent.adapter_dir, batch_size=8, epochs=1))
    assert parent.losses["sft"][-1] < parent.losses["sft"][0]
    assert child.losses["sft"][0] == pytest.approx(parent.losses["sft"][-1], rel=0.01)


def test_dpo_alone_starts_from_the_parent_adapter(tmp_path):
    parent = train(make_job(tmp_path, sums(8), "parent", epochs=5, learning_rate=1e-2))
    child = train(make_job(tmp_path, preferences(8), "child", parent=parent.adapter_dir, dpo_learning_rate=5e-3))
    assert child.reference_loss == pytest.approx(0.6931, abs=1e-4)
    assert child.losses["dpo"][-1] < 0.6931
    assert child.sft_rows == 0


def test_an_unknown_architecture_is_trained_with_the_upper_profile_and_says_so(tmp_path):
    make_base(tmp_path / "base", "olmo2")
    job = make_job(tmp_path, sums(4), epochs=1)
    result = train(job)
    assert result.profile == "upper"
    assert "olmo2" in events_of(job, "start")[0]["note"]


def test_rows_beyond_the_context_are_left_out_and_counted(tmp_path):
    long = sft([say("user", "1 + " * 400), say("assistant", "400")])
    result = train(make_job(tmp_path, [*sums(4), long], epochs=1, max_length=200))
    assert (result.sft_rows, result.too_long) == (4, 1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_its_budget_cut_short_says_what_it_did_not_reach(tmp_path, monkeypatch, accumulation):
    from distill.train.fast import HiddenCache

    rows = [e.model_copy(update={"sources": [f"run_{n}", "shared"]}) for n, e in enumerate(sums(16))]
    whole = make_job(tmp_path, rows, batch_size=2, accumulation=accumulation)
    tokens = train(whole)
    assert tokens.unreached == []
    seen: list[int] = []
    fetch = HiddenCache.fetch
    monkeypatch.setattr(HiddenCache, "fetch", lambda self, at, *rest: (seen.extend(at), fetch(self, at, *rest))[1])
    cut = whole.model_copy(update={"out_dir": tmp_path / "out" / "cut", "max_tokens": tokens.tokens * 3 // 10})
    result = train(cut)
    assert 0 < len(result.losses["sft"]) < 8 // accumulation
    assert result.unreached == sorted({f"run_{n}" for n in range(16)} - {f"run_{n}" for n in seen})


def test_a_row_that_cannot_be_rendered_is_left_out_counted_and_told(tmp_path):
    empty = sft([say("user", "1"), say("assistant", "2", True)])
    job = make_job(tmp_path, [*sums(4), empty], epochs=1)
    result = train(job)
    assert (result.sft_rows, result.unrendered) == (4, 1)
    assert "1 examples left out" in result.note
    assert empty.id in result.note
    assert events_of(job, "start")[0]["unrendered"] == 1


@pytest.mark.parametrize(
    ("examples", "message"),
    [([], "no examples"), ([sft([say("user", "1"), say("assistant", "2", True)])], "nothing to learn")],
)
def test_bad_data_is_refused_with_exit_code_2_and_one_line(tmp_path, examples, message):
    job = make_job(tmp_path, examples)
    job_file = tmp_path / "job.json"
    job_file.write_text(job.model_dump_json())
    assert main([str(job_file)]) == 2
    (event,) = events_of(job, "error")
    assert message in event["message"]
    assert "\n" not in event["message"]
    assert not job.out_dir.exists()


def test_a_job_file_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "job.json").write_text("{}")
    assert main([str(tmp_path / "job.json")]) == 2
    assert "no training job" in capsys.readouterr().err


def test_a_foreign_folder_is_never_overwritten(tmp_path):
    job = make_job(tmp_path, sums(4))
    (job.out_dir / "precious").mkdir(parents=True)
    with pytest.raises(TrainingError, match="no finished run"):
        train(job)
    assert (job.out_dir / "precious").is_dir()


def test_other_data_does_not_go_on_from_the_checkpoints_of_the_first(tmp_path, monkeypatch):
    job = make_job(tmp_path, sums(4), epochs=1)
    monkeypatch.setattr("distill.train.job._publish", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        train(job)
    assert not job.out_dir.exists()
    monkeypatch.undo()
    write_dataset(job.dataset_dir, sums(8))
    assert len(train(job).losses["sft"]) == 2


def service(job: TrainJob, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that trains the job, as the service would."""
    (tmp_path / "the-job.json").write_text(job.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from distill.train.config import TrainJob;"
        "from distill.train.launch import run;"
        "run(TrainJob.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.executable), lambda e: None)"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "the-job.json")], env=environment)


def wait_for(condition, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trainer_of(job: TrainJob) -> int:
    return json.loads((job.work_dir / "lock").read_text())["trainer"][0]


def gone(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


LONG = {"epochs": 60, "checkpoint_steps": 5, "learning_rate": 1e-3}
"""Settings of a run with 120 steps over eight rows: long enough to be killed in its middle."""


def test_a_killed_run_goes_on_from_its_checkpoint_ends_once_and_never_shows_a_half_adapter(tmp_path):
    job = make_job(tmp_path, sums(8), **LONG)
    over, half = threading.Event(), []

    def watch() -> None:
        while not over.is_set():
            if job.out_dir.exists() and not (finished(job) and tensor_names(job.out_dir)):
                half.append(sorted(p.name for p in job.out_dir.iterdir()))
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:

        def kill_at_checkpoint(event: dict[str, Any]) -> None:
            if event["event"] == "checkpoint" and event["step"] < 120:
                os.kill(trainer_of(job), signal.SIGKILL)

        with pytest.raises(TrainingError, match=r"trainer died \(exit code -9\): it was killed.*memory"):
            run(job, PYTHON, kill_at_checkpoint)
        assert not job.out_dir.exists()
        kept = last_checkpoint(job.work_dir / "sft")
        assert kept is not None
        killed_at = int(kept.name.rpartition("-")[2])
        seen: list[dict[str, Any]] = []
        result = run(job, PYTHON, seen.append)
    finally:
        over.set()
        watcher.join()
    assert half == []
    resumed = [e["step"] for e in seen if e["event"] == "step"]
    assert resumed[0] == killed_at + 1
    assert len(events_of(job, "done")) == 1
    assert not job.work_dir.exists()
    uninterrupted = train(job.model_copy(update={"out_dir": tmp_path / "out" / "at-once"}))
    assert len(result.losses["sft"]) == 120
    assert result.losses["sft"] == pytest.approx(uninterrupted.losses["sft"], rel=1e-4)


def test_an_orphan_is_killed_before_the_job_goes_on_and_a_live_run_is_left_alone(tmp_path):
    job = make_job(tmp_path, sums(8), **LONG)
    first = service(job, tmp_path)
    wait_for(lambda: events_of(job, "checkpoint"))
    trainer = trainer_of(job)
    os.kill(trainer, signal.SIGSTOP)  # it can neither train nor watch its parent
    with pytest.raises(TrainingError, match="training this job already"):
        run(job, PYTHON, lambda event: None)
    assert not gone(trainer)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    result = run(job, PYTHON, lambda event: None)
    assert gone(trainer)
    assert len(result.losses["sft"]) == 120
    assert len(events_of(job, "done")) == 1


def test_a_trainer_ends_when_the_process_that_started_it_dies():
    watching = "import sys, time; from distill.train.progress import end_with;"
    watching += "end_with(int(sys.argv[1]), 0.05); print('watching', flush=True); time.sleep(600)"
    starting = "import os, subprocess, sys, time;"
    starting += "p = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], start_new_session=True);"
    starting += "print(p.pid, flush=True); time.sleep(600)"
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", starting, watching], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    said = [parent.stdout.readline().split()[0] for _ in range(2)]
    (child,) = [int(word) for word in said if word != b"watching"]
    assert not gone(child)
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(child))
    parent.stdout.close()


def test_cancelling_ends_the_trainer_and_leaves_no_adapter(tmp_path):
    job = make_job(tmp_path, sums(8), **LONG)
    trainers: list[int] = []

    def cancelled() -> bool:
        trainers.append(trainer_of(job))
        return True

    with pytest.raises(TrainingError, match="cancelled"):
        run(job, PYTHON, lambda event: None, cancelled)
    assert gone(trainers[0])
    assert not job.out_dir.exists()


def test_the_trainers_last_word_reaches_the_service(tmp_path):
    job = make_job(tmp_path, [sft([say("user", "1"), say("assistant", "2", True)])])
    with pytest.raises(TrainingError, match="nothing to learn from it"):
        run(job, PYTHON, lambda event: None)


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TrainingError, match="could not be started with /no/such/python"):
        run(make_job(tmp_path, sums(4)), Path("/no/such/python"), lambda event: None)


@pytest.mark.parametrize("fits", [True, False])
def test_a_budget_of_tokens_shortens_the_run_from_its_start_and_says_so(tmp_path, fits):
    whole = train(make_job(tmp_path, [*sums(8), *preferences(4)], "whole", epochs=4, batch_size=2))
    job = make_job(tmp_path, [*sums(8), *preferences(4)], "part", epochs=4, batch_size=2)
    limit = whole.tokens if fits else whole.tokens // 2
    part = train(job.model_copy(update={"max_tokens": limit}))
    planned = events_of(job, "start")[0]["steps"]
    done = events_of(job, "step")[-1]["step"]
    assert part.reference_loss == pytest.approx(0.6931, abs=1e-4)
    assert part.planned_tokens == whole.tokens
    if fits:
        assert (part.losses, part.tokens, part.note) == (whole.losses, whole.tokens, "")
        assert (planned, done) == (18, 18)
    else:
        assert part.tokens <= limit + max(whole.tokens // 18 * 2, 1)
        assert planned == done == 9
        assert "9 of 18 steps" in part.note
        assert part.mask_share == pytest.approx(whole.mask_share, abs=0.05)


def test_a_run_whose_time_is_up_ends_with_the_step_it_is_in(tmp_path):
    job = make_job(tmp_path, [*sums(8), *preferences(4)], epochs=4, batch_size=2)
    result = train(job.model_copy(update={"max_seconds": 1e-6}))
    assert len(result.losses["sft"]) == 1
    assert "dpo" not in result.losses
    assert "1 of 18 steps" in result.note
    assert (job.out_dir / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("same", [True, False])
def test_the_time_of_an_attempt_that_left_no_checkpoint_is_spent_all_the_same(tmp_path, monkeypatch, same):
    job = make_job(tmp_path, sums(8), epochs=4, batch_size=2).model_copy(update={"max_seconds": 3000.0})
    monkeypatch.setattr("distill.train.job.sft_trainer", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        train(job)
    monkeypatch.undo()
    with job.progress_path.open("a") as file:
        file.write(json.dumps({"event": "step", "step": 3, "seconds": 4000.0}) + '\n{"event": "st')
    if not same:
        write_dataset(job.dataset_dir, sums(6))
    assert len(train(job).losses["sft"]) == (1 if same else 12)
