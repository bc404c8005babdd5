"""What a running trainer tells the world, and how it can be gone on with.

Owns the progress file's events, the checkpoints' completeness marks and the trainer's watch over its
parent. Knows nothing of models.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory.errors import TrainingError
from memory.jsonl import lines_of

COMPLETE = "complete.json"
"""Written into a checkpoint when all its other files are there."""


@dataclass
class Progress:
    """Appends events to the progress file; a process that is not the first of its run says nothing."""

    path: Path
    steps: int = 0
    """Optimizer steps of all phases together."""
    offset: int = 0
    """Steps and tokens of the phases before the present one."""
    tokens_before: int = 0
    max_tokens: int | None = None
    max_seconds: float | None = None
    """The run's budget (`TrainJob`)."""
    seconds_before: float = 0.0
    """Wall time of earlier, interrupted attempts, what they did behind their last checkpoint included."""
    began: float = field(default_factory=time.monotonic)
    main: bool = field(default_factory=lambda: os.environ.get("RANK", "0") == "0")

    @property
    def seconds(self) -> float:
        """Wall time of the run so far."""
        return self.seconds_before + time.monotonic() - self.began

    def spent(self, tokens: int) -> bool:
        """Whether the budget allows no further step after `tokens`. All processes of a run are told the same."""
        if self.max_tokens is not None and tokens >= self.max_tokens:
            return True
        if self.max_seconds is None:
            return False
        late = self.seconds >= self.max_seconds
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return late
        from accelerate.utils import broadcast_object_list

        return bool(broadcast_object_list([late])[0])

    def say(self, event: str, **figures: Any) -> None:
        """One line: the event (start, cache, step, checkpoint, done, error) with its figures."""
        if not self.main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, **figures, "seconds": round(self.seconds, 3)}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@functools.cache
def callback_class() -> type:
    """The Trainer callback that turns a phase's steps and checkpoints into progress events."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self, progress: Progress, phase: str, cached: Callable[[], dict[str, Any] | None]) -> None:
            self.progress, self.phase, self.cached = progress, phase, cached
            self.first = 0
            self.began = 0.0
            self.seen = 0
            self.told = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.first, self.began = state.global_step, time.monotonic()
            self.seen = int(state.num_input_tokens_seen)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.progress.spent(self.progress.tokens_before + int(state.num_input_tokens_seen)):
                control.should_training_stop = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if not logs or "loss" not in logs:
                return
            loss, step = float(logs["loss"]), state.global_step
            if not math.isfinite(loss):
                raise TrainingError(f"the {self.phase} loss is {loss} at step {step}; lower the learning rate")
            progress = self.progress
            done, total = progress.offset + step, max(progress.steps, progress.offset + state.max_steps)
            took = time.monotonic() - self.began
            pace = took / max(1, step - self.first)
            speed = (int(state.num_input_tokens_seen) - self.seen) / max(took, 1e-9)
            tokens = progress.tokens_before + int(state.num_input_tokens_seen)
            figures = {"phase": self.phase, "step": done, "steps": total, "loss": loss, "tokens": tokens}
            progress.say("step", **figures, tokens_per_s=round(speed, 1), eta_s=round(pace * (total - done), 1))
            if not self.told and (cached := self.cached()) is not None:
                self.told = True
                progress.say("cache", phase=self.phase, **cached)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.progress.main and folder.is_dir():
                write_whole(folder / COMPLETE, "{}")
                self.progress.say("checkpoint", phase=self.phase, step=self.progress.offset + state.global_step)

    return Reporter


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that it is never seen half-written."""
    half = path.with_name(path.name + ".half")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None without one.

    One that was cut short by a kill has no mark and is passed over; the next save writes over it.
    """
    marks = list(folder.glob(f"checkpoint-*/{COMPLETE}"))
    if not marks:
        return None
    return max(marks, key=lambda mark: int(mark.parent.name.rpartition("-")[2])).parent


def told_seconds(path: Path) -> float:
    """The run's wall time by the last event in its progress file; a line that a kill cut short is passed over."""
    for line in reversed(lines_of(path.read_text(encoding="utf-8")) if path.is_file() else []):
        with suppress(ValueError):
            return float(json.loads(line)["seconds"])
    return 0.0


def end_with(parent: int, every_s: float = 0.5) -> None:
    """End this process and its whole group soon after process `parent` has died.

    Only for a trainer that was started as the leader of its own group, or below one (`accelerate`).
    """
    direct = os.getppid() == parent

    def alive() -> bool:
        if direct:
            return os.getppid() == parent
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def watch() -> None:
        while alive():
            time.sleep(every_s)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
