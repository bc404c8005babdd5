"""The endpoint as the official npm package meets it: `npm/e2e.mjs`, which also runs against a real service."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.llm import ChatRequest
from tests.serve.fakes import running, settings_in

SCRIPT = Path(__file__).with_name("npm")
CHECKS = ["models", "chat", "stream", "tools", "responses", "embeddings", "batch", "errors"]


def pupil(request: ChatRequest) -> str | Exception:
    last = str(request.messages[-1]["content"])
    if "weather" in last:
        return 'Action: get_weather({"city": "Paris"})'
    return "Action: finish(3)" if request.regex else "Three."


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and the pinned package."""
    missing = [tool for tool in ("node", "npm") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: the npm package is not tested")
    folder = tmp_path_factory.mktemp("npm") / "e2e"
    shutil.copytree(SCRIPT, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not install the openai package within five minutes: no registry in reach?")
    if done.returncode:
        pytest.skip(f"npm cannot install the openai package here: {done.stderr.strip()[-300:]}")
    return folder


def test_the_official_npm_package_does_all_three_uses(installed: Path, tmp_path: Path) -> None:
    with running(settings_in(tmp_path), pupil) as (url, _):
        env = {**os.environ, "NIGHTSCHOOL_URL": f"{url}/v1"}
        done = subprocess.run(["node", "e2e.mjs"], cwd=installed, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [f"ok {name}" for name in CHECKS], done.stdout + done.stderr
