"""`python -m distill.train JOB.json`: the trainer process.

Exit codes: 0 the adapter is there; 2 the data, model or settings were refused; 1 anything else. Each
failure leaves one `error` event, whose `message` is fit to be shown to a user.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError

from distill.train.config import TrainJob
from distill.train.progress import Progress, end_with
from memory.errors import NightschoolError


def main(arguments: list[str] | None = None) -> int:
    """Run the job file named in `arguments`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distill.train", description="Train an adapter as a job says.")
    parser.add_argument("job", type=Path, help="a TrainJob in JSON")
    parser.add_argument("--parent", type=int, help="end when this process, which started the trainer, is gone")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        end_with(options.parent)
    try:
        job = TrainJob.model_validate_json(options.job.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        print(f"{options.job} is no training job: {error}", file=sys.stderr)
        return 2
    progress = Progress(job.progress_path)
    try:
        from distill.train.job import train

        train(job)
    except NightschoolError as error:
        progress.say("error", message=_line(str(error)), refused=True)
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        traceback.print_exc()
        progress.say("error", message=_line(f"{type(error).__name__}: {error}"), refused=False)
        return 1
    return 0


def _line(text: str) -> str:
    return " ".join(text.split())[:500]


if __name__ == "__main__":
    sys.exit(main())
