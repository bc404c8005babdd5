"""The benchmarks of the front door: `nightschool bench gateway | agent | batch`.

The service is a real process with a real ledger, durable commits and a key; its engine is a fake upstream
(gateway) or the real one (agent), both reached by `engine.url`. Baselines run beside it, round by round.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from evals.bench import BenchResult, result
from evals.load import COUNTER, Load, LoadResult, percentile
from memory.errors import EngineError
from serve.engine import ROOT
from serve.settings import Settings

LITELLM = "litellm[proxy]==1.106.2"
"""The proxy that is measured against: the newest whose dependencies are all on PyPI."""

LATENCY_MS = 30.0
CONCURRENT = {1: 120, 16: 800, 64: 1600}
"""Concurrent requests -> requests of one leg of one round."""

ROUNDS = 3
START_S = 180.0


@dataclass(frozen=True)
class Target:
    """One way to the upstream."""

    port: int
    model: str
    key: str


@contextmanager
def process(command: Sequence[str | Path], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A child process with its own group, ended with the block; its output goes to `log`."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            [str(part) for part in command],
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextmanager
def upstream(folder: Path, latency_ms: float, key: str = "none") -> Iterator[Target]:
    """`evals.upstream` in a process of its own."""
    log = folder / "upstream.log"
    command = [sys.executable, "-m", "evals.upstream", "--latency-ms", str(latency_ms), "--key", key]
    with process(command, log, {}) as child:
        wait_until(lambda: log.read_text().endswith("}\n"), child, log)
        yield Target(json.loads(log.read_text())["port"], "base", key)


@contextmanager
def service(
    folder: Path, engine: Target, model: str, scopes: Sequence[str] = ("chat",), env: Mapping[str, str] | None = None
) -> Iterator[Target]:
    """Nightschool as `nightschool serve` starts it, on an engine that runs already, with a key of these scopes."""
    import httpx

    from memory import keys
    from serve.wiring import open_ledger, running_service

    data = folder / "data"
    ledger = open_ledger(Settings(data_dir=data))
    try:
        secret = keys.mint(ledger.database, keys.ApiKey(name="bench", scopes=[keys.Scope(s) for s in scopes]))
    finally:
        ledger.close()
    log = folder / "service.log"
    given = {
        "NIGHTSCHOOL_MODEL": model,
        "NIGHTSCHOOL_ENGINE__URL": f"http://127.0.0.1:{engine.port}",
        "NIGHTSCHOOL_ENGINE__API_KEY": engine.key,
        "NIGHTSCHOOL_SERVER__MAX_CONCURRENT": "256",
    }
    command = [sys.executable, "-m", "serve.cli", "--data-dir", data, "serve", "--port", "0"]
    with process(command, log, given | dict(env or {})) as child:
        wait_until(lambda: running_service(data) is not None, child, log)
        url = (running_service(data) or {})["url"]
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200, child, log)
        yield Target(int(url.rpartition(":")[2]), "champion", secret)


@contextmanager
def litellm_proxy(folder: Path, engine: Target) -> Iterator[Target]:
    """LiteLLM's proxy with one worker and a master key, as its documentation sets up for production."""
    import httpx

    key = "sk-bench"
    config = {
        "model_list": [
            {
                "model_name": "champion",
                "litellm_params": {
                    "model": f"openai/{engine.model}",
                    "api_base": f"http://127.0.0.1:{engine.port}/v1",
                    "api_key": engine.key,
                },
            }
        ],
        "litellm_settings": {"set_verbose": False, "json_logs": False, "num_retries": 0},
        "general_settings": {"master_key": key},
    }
    # JSON is YAML.
    (folder / "litellm.yaml").write_text(json.dumps(config))
    binary, port, log = _litellm_env() / "bin" / "litellm", _free_port(), folder / "litellm.log"
    command = [binary, "--config", folder / "litellm.yaml", "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION"}
    with process([*command, "--num_workers", "1", "--telemetry", "False"], log, {**quiet, "PYTHONPATH": ""}) as child:
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200, child, log)
        yield Target(port, "champion", key)


def _litellm_env() -> Path:
    """The proxy's own environment, made at the first use: its dependencies are not ours."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nightschool" / f"litellm-{LITELLM.rpartition('=')[2]}"
    if (folder / "complete").exists():
        return folder
    print(f"installing {LITELLM} from PyPI into {folder} (once, some 500 MB)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    for command in ([sys.executable, "-m", "venv", folder], [folder / "bin" / "pip", "install", "-q", LITELLM]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise EngineError(f"{LITELLM} cannot be installed: {done.stderr.strip()[-300:]}")
    (folder / "complete").touch()
    return folder


def wait_until(ready: Any, child: subprocess.Popen[bytes], log: Path) -> None:
    """Return once `ready()` is true; EngineError, with the log's end, when the process dies or takes too long."""
    import httpx

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            if ready():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    what = f"ended with {child.returncode}" if child.poll() is not None else f"was not up in {START_S:.0f} s"
    raise EngineError(f"{log.stem} {what}: {log.read_text(errors='replace').strip()[-500:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fire(target: Target, concurrency: int, requests: int) -> LoadResult:
    """Load one target from a process of its own. EngineError when a reply is no success."""
    load = Load(
        port=target.port,
        headers={"Authorization": f"Bearer {target.key}"},
        body={
            "model": target.model,
            "messages": [{"role": "user", "content": f"Question {COUNTER}: what is the answer?"}],
            "max_tokens": 64,
        },
        concurrency=concurrency,
        requests=requests,
    )
    done = subprocess.run(
        [sys.executable, "-m", "evals.load"],
        input=load.model_dump_json(),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode:
        raise EngineError(f"the load generator failed: {done.stderr.strip()[-500:]}")
    measured = LoadResult.model_validate_json(done.stdout)
    if measured.bad:
        raise EngineError(f"{measured.bad} of {requests} replies were no success, e.g. {measured.first_bad}")
    return measured


def gateway(settings: Settings, rounds: int = ROUNDS, latency_ms: float = LATENCY_MS) -> BenchResult:
    """Latency that the plain-model path adds to the upstream's, beside what LiteLLM's proxy adds."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        straight = stack.enter_context(upstream(folder, latency_ms))
        targets = {
            "direct": straight,
            "nightschool": stack.enter_context(service(folder, straight, str(folder / "model"))),
            "litellm": stack.enter_context(litellm_proxy(folder, straight)),
        }
        measured = {name: {c: [] for c in CONCURRENT} for name in targets}
        sent = 0
        for number in range(-1, rounds):  # the first round warms up and is not counted
            for concurrency, requests in CONCURRENT.items():
                amount = requests if number >= 0 else max(4 * concurrency, 20)
                for name, target in targets.items():
                    leg = fire(target, concurrency, amount)
                    sent += amount if name == "nightschool" else 0
                    if number >= 0:
                        measured[name][concurrency].append(leg)
        figures = _gateway_figures(measured)
        stack.close()
        figures |= {"journaled": journaled(folder / "data"), "sent": sent, "upstream_ms": latency_ms, "rounds": rounds}
    figures["journaled_over_sent"] = figures["journaled"] / sent
    aims = {f"p{p}_over_litellm_at_{c}": "< 0.333" for c in CONCURRENT for p in (50, 99)}
    aims |= {"added_p50_ms_at_16": "< 5", "added_p99_ms_at_16": "< 20", "journaled_over_sent": "== 1"}
    return result("gateway", figures, aims)


def _gateway_figures(measured: Mapping[str, Mapping[int, Sequence[LoadResult]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for concurrency in CONCURRENT:
        legs = {name: by_concurrency[concurrency] for name, by_concurrency in measured.items()}
        for p in (50, 99):
            ms = {
                name: [percentile(leg.latencies_s, p / 100) * 1000 for leg in of_name] for name, of_name in legs.items()
            }
            ours = [a - b for a, b in zip(ms["nightschool"], ms["direct"], strict=True)]
            theirs = [a - b for a, b in zip(ms["litellm"], ms["direct"], strict=True)]
            figures[f"direct_p{p}_ms_at_{concurrency}"] = round(median(ms["direct"]), 2)
            figures[f"added_p{p}_ms_at_{concurrency}"] = round(median(ours), 2)
            figures[f"litellm_added_p{p}_ms_at_{concurrency}"] = round(median(theirs), 2)
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            figures[f"p{p}_over_litellm_at_{concurrency}"] = round(median(ratios), 3)
        for name in ("nightschool", "litellm"):
            rates = [len(leg.latencies_s) / leg.seconds for leg in legs[name]]
            figures[f"{name}_per_s_at_{concurrency}"] = round(median(rates), 1)
    return figures


def journaled(data_dir: Path) -> int:
    """How many runs the ledger of a stopped service holds."""
    from serve.wiring import open_ledger

    ledger = open_ledger(Settings(data_dir=data_dir))
    try:
        return ledger.watermark()["trajectory"]
    finally:
        ledger.close()


def batch(settings: Settings, lines: int = 10_000, few: int = 1_000) -> BenchResult:
    """Lines per second of batches against an upstream that answers at once, and the service's peak memory.

    A small batch warms up and sets the mark that the large one's peak is held against.
    """
    import httpx
    import psutil

    from serve.wiring import running_service

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        straight = stack.enter_context(upstream(folder, 0.0))
        ours = stack.enter_context(service(folder, straight, str(folder / "model"), scopes=("batch",)))
        pid = (running_service(folder / "data") or {})["pid"]
        http = stack.enter_context(
            httpx.Client(
                base_url=f"http://127.0.0.1:{ours.port}", headers={"Authorization": f"Bearer {ours.key}"}, timeout=120
            )
        )
        figures: dict[str, Any] = {}
        for name, model, amount in (
            ("few", ours.model, few),
            ("many", ours.model, lines),
            ("agent", "nightschool", few),
        ):
            before = psutil.Process(pid).cpu_times()
            seconds = _run_batch(http, model, amount)
            spent = psutil.Process(pid).cpu_times()
            figures[f"{name}_lines"] = amount
            figures[f"{name}_lines_per_s"] = round(amount / seconds, 1)
            figures[f"{name}_cpu_ms_per_line"] = round(
                (spent.user + spent.system - before.user - before.system) * 1000 / amount, 2
            )
            figures[f"{name}_peak_rss_mb"] = _peak_rss_mb(pid)
        stats = httpx.get(
            f"http://127.0.0.1:{straight.port}/stats", headers={"Authorization": f"Bearer {straight.key}"}
        )
        figures["calls_over_lines"] = stats.json()["chats"] / (lines + 2 * few)
    figures["peak_rss_many_over_few"] = round(figures["many_peak_rss_mb"] / figures["few_peak_rss_mb"], 3)
    aims = {"many_lines_per_s": ">= 300", "peak_rss_many_over_few": "<= 1.1", "calls_over_lines": "== 1"}
    return result("batch", figures, aims)


def _run_batch(http: Any, model: str, lines: int) -> float:
    """Seconds from the batch's creation to its end. EngineError unless every line was completed."""
    made = (
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": f"Question {i}: what is the answer?"}],
                "max_tokens": 64,
            },
        }
        for i in range(lines)
    )
    data = "".join(json.dumps(line) + "\n" for line in made).encode()
    uploaded = http.post("/v1/files", files={"file": ("lines.jsonl", data)}, data={"purpose": "batch"}).json()
    body = {"input_file_id": uploaded["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    started = time.perf_counter()
    batch = http.post("/v1/batches", json=body).json()
    while batch["status"] in ("validating", "in_progress", "finalizing"):
        time.sleep(0.1)
        batch = http.get(f"/v1/batches/{batch['id']}").json()
    seconds = time.perf_counter() - started
    if batch["status"] != "completed" or batch["request_counts"]["completed"] != lines:
        raise EngineError(f"the batch ended as {batch['status']} with {batch['request_counts']}")
    return seconds


def _peak_rss_mb(pid: int) -> float:
    """The most memory that the process has had at once, as the kernel counted it."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024, 1)
