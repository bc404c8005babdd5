"""`nightschool serve` as a process of its own with the real engine, to be used, killed and started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from serve.client import Client
from serve.wiring import running_service
from tests.serve.conftest import PYTHON


def until(happened: Callable[[], Any], what: str, timeout_s: float = 600) -> Any:
    """Wait for something to become true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := happened():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen in {timeout_s:.0f} s")


class Service:
    """`nightschool serve` as a process of its own, to be killed and started again."""

    def __init__(self, data_dir: Path, model: Path) -> None:
        self.data_dir = data_dir
        self._env = os.environ | {
            "NIGHTSCHOOL_MODEL": str(model),
            "NIGHTSCHOOL_ENGINE__PYTHON": str(PYTHON),
            "NIGHTSCHOOL_TRAIN__EPOCHS": "1",
            "NIGHTSCHOOL_TRAIN__CHECKPOINT_STEPS": "1",
            "NIGHTSCHOOL_TRAIN__WARMUP_STEPS": "0",
            "NIGHTSCHOOL_NIGHT__REHEARSAL": "8",
            "NIGHTSCHOOL_NIGHT__MIN_EXAMPLES": "4",
            "NIGHTSCHOOL_NIGHT__PRINCIPLES": "2",
            "NIGHTSCHOOL_GATE__MIN_TASKS": "6",
            "NIGHTSCHOOL_GATE__MIN_CONTROL_TASKS": "4",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Client:
        command = [sys.executable, "-m", "serve.cli", "--data-dir", str(self.data_dir), "serve", "--port", "0"]
        with (self.data_dir.parent / "service.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._env, start_new_session=True)
        info = until(lambda: running_service(self.data_dir), "the service's start")
        client = Client(info["url"], info["token"])
        until(lambda: client.get("/readyz")["status"] == "ready", "the engine's start", 900)
        return client

    def kill(self) -> None:
        """`kill -9`; the engine must not outlive it."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        until(lambda: not any(_alive(child) for child in children), "the end of the service's processes", 60)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
