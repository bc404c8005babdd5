"""A stand-in for the trainer process: real files, in the trainer's order, and nothing learned.

Run by `fake_trainer_python` in place of the trainer's interpreter, with the same arguments. It writes the weights in
pieces, so that a kill finds them half-written, and watches its parent as the real one does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from distill.train.config import RESULT, TrainJob, TrainResult
from distill.train.progress import end_with

PIECES = 8
PIECE_S = 0.04


def fake_trainer_python(folder: Path) -> Path:
    """An executable to give as `Settings.trainer_python`."""
    script = folder / "fake-trainer"
    script.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n')
    script.chmod(0o755)
    return script


def made_result(job: TrainJob, rows: int) -> TrainResult:
    """What a trainer would say of `rows` rows."""
    return TrainResult(
        adapter_dir=job.out_dir,
        profile=job.config.profile,
        sft_rows=rows,
        dpo_pairs=0,
        too_long=0,
        losses={"sft": [2.0, 0.1]},
        tokens=100,
        trained_tokens=10,
        mask_share=0.1,
        seconds=1.0,
        tokens_per_s=100.0,
        reference_loss=None,
        config=job.config,
    )


def main(job_file: str, _flag: str, parent: str) -> None:
    end_with(int(parent), 0.02)
    job = TrainJob.model_validate_json(Path(job_file).read_text(encoding="utf-8"))
    data = (job.dataset_dir / "sft.jsonl").read_bytes()
    ready = job.work_dir / "ready"
    ready.mkdir(parents=True, exist_ok=True)
    (ready / "adapter_config.json").write_text(json.dumps({"r": 16}))
    with (ready / "adapter_model.safetensors").open("wb") as weights, job.progress_path.open("a") as events:
        for step in range(1, PIECES + 1):
            time.sleep(PIECE_S)
            weights.write(data[:1000])
            weights.flush()
            events.write(json.dumps({"event": "step", "step": step, "steps": PIECES, "loss": 1 / step}) + "\n")
            events.flush()
    result = made_result(job, data.count(b"\n"))
    (ready / RESULT).write_text(result.model_dump_json())
    ready.rename(job.out_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
