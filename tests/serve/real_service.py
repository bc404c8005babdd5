"""A real service process; only its engine is the stand-in of `fake_engine`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import openai

from serve.wiring import running_service
from tests.serve.fake_engine import ROOT, fake_python


def started(folder: Path, concurrency: int = 8) -> tuple[subprocess.Popen[bytes], openai.OpenAI]:
    """`nightschool serve` in a folder, once it answers, and a client. Its engine writes `asked.jsonl` there."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    mine = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTSCHOOL_")}
    env = mine | {
        "PYTHONPATH": str(ROOT),
        "NIGHTSCHOOL_MODEL": str(folder / "model"),
        "NIGHTSCHOOL_ENGINE__PYTHON": str(fake_python(folder)),
        "NIGHTSCHOOL_ENGINE__DEVICE": "cpu",
        "NIGHTSCHOOL_SERVER__KEYS": "false",
        "NIGHTSCHOOL_BATCH__CONCURRENCY": str(concurrency),
        "NIGHTSCHOOL_FAKE": json.dumps({"chat_s": 0.02, "chat_log": str(folder / "asked.jsonl")}),
    }
    with (folder / "service.log").open("ab") as log:
        command = [sys.executable, "-m", "serve.cli", "serve", "--port", "0"]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)

    def up() -> bool:
        assert process.poll() is None, (folder / "service.log").read_text()[-3000:]
        return running_service(folder / "data") is not None

    until(up, 120)
    info = running_service(folder / "data")
    assert info is not None
    return process, openai.OpenAI(base_url=f"{info['url']}/v1", api_key="none", max_retries=5)


def until(condition: Callable[[], bool], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
