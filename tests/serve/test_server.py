"""`nightschool serve` as a process: the first key, the operator's token, the end at SIGTERM. Its engine is a fake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai

from memory import keys
from memory.ledger import Ledger
from serve.client import Client
from serve.server import uvicorn_config
from serve.wiring import running_service
from tests.serve.fake_engine import ROOT, fake_python
from tests.serve.real_service import until


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """The process and its `service.json`; what it prints goes to `stdout` and `stderr` in the folder."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    env = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTSCHOOL_")} | {
        "PYTHONPATH": str(ROOT),
        "NIGHTSCHOOL_MODEL": str(folder / "model"),
        "NIGHTSCHOOL_ENGINE__PYTHON": str(fake_python(folder)),
        "NIGHTSCHOOL_ENGINE__DEVICE": "cpu",
    }
    command = [sys.executable, "-m", "serve.cli", "serve", "--port", "0", *options]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)
    try:

        def up() -> bool:
            assert process.poll() is None, (folder / "stderr").read_text()[-3000:]
            return running_service(folder / "data") is not None

        until(up, 120)
        info = running_service(folder / "data")
        assert info is not None
        yield process, info
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(120)


def printed_secrets(folder: Path) -> list[str]:
    return [word for word in (folder / "stdout").read_text().split() if word.startswith("sk-ns-")]


def test_the_first_start_prints_an_admin_key_once_and_no_log_has_it(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, info):
        (secret,) = printed_secrets(tmp_path)
        with openai.OpenAI(base_url=f"{info['url']}/v1", api_key=secret, max_retries=0) as client:
            assert client.models.list().data
            assert client.fine_tuning.jobs.list().data == []
        assert httpx.get(f"{info['url']}/v1/models").status_code == 401
        assert Client(info["url"], info["token"]).get("/v1/keys")["data"][0]["name"] == "admin"
        assert ended(process) == 0
    assert running_service(tmp_path / "data") is None
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "stdout"]
    assert not any(secret.encode() in path.read_bytes() for path in kept)
    with serving(tmp_path) as (process, info):
        assert printed_secrets(tmp_path) == []
        headers = {"Authorization": f"Bearer {secret}"}
        assert httpx.get(f"{info['url']}/v1/models", headers=headers).status_code == 200


def test_a_service_that_a_command_starts_for_itself_makes_no_key(tmp_path: Path) -> None:
    with serving(tmp_path, "--background") as (_, info):
        assert printed_secrets(tmp_path) == []
        assert Client(info["url"], info["token"]).get("/v1/keys")["data"] == []
        assert httpx.get(f"{info['url']}/v1/models").status_code == 401
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'data' / 'ledger.sqlite'}")
    assert keys.all_keys(ledger.database) == []
    ledger.close()


def test_a_night_that_was_missed_is_made_up_by_a_service_and_not_by_one_that_a_command_started(tmp_path: Path) -> None:
    hour = datetime.now() - timedelta(hours=1)
    cron = f"{hour.minute} {hour.hour} * * *"
    (tmp_path / "nightschool.toml").write_text(f'[night]\nschedule = "{cron}"\n')
    (tmp_path / "data").mkdir()
    told = {"cron": cron, "since": (hour - timedelta(hours=9)).isoformat()}
    (tmp_path / "data" / "schedule.json").write_text(json.dumps(told))

    def nights(info: dict[str, Any]) -> list[dict[str, Any]]:
        return Client(info["url"], info["token"]).get("/v1/fine_tuning/jobs")["data"]

    with serving(tmp_path, "--background") as (process, info):
        time.sleep(1)
        assert nights(info) == []
        assert ended(process) == 0
    with serving(tmp_path) as (process, info):
        until(lambda: [job["nightschool"]["status"] for job in nights(info)] == ["skipped"], 60)
        assert ended(process) == 0
    with serving(tmp_path) as (_, info):
        time.sleep(1)
        assert len(nights(info)) == 1


def test_an_insecure_service_asks_for_no_key_and_makes_none(tmp_path: Path) -> None:
    with serving(tmp_path, "--insecure") as (_, info):
        assert printed_secrets(tmp_path) == []
        assert httpx.get(f"{info['url']}/v1/models").status_code == 200


def test_an_idle_connection_stays_open_longer_than_clients_keep_theirs() -> None:
    """Else both give up in the same moment, and a request sent just then is lost (seen in CI)."""
    theirs = [httpx.Limits().keepalive_expiry, openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry]
    assert all(limit and uvicorn_config(lambda: None, "error").timeout_keep_alive > limit for limit in theirs)
