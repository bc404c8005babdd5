"""vLLM as a supervised child process, or an external vLLM by URL: where the model lives now.

Owns starting, watching, restarting and stopping the engine, and its private port and key. Owns neither the settings
that suit the machine (`serve.engine_settings`) nor adapters: `serve.adapters` puts them back through `on_ready`
whenever the engine has started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

from agent.llm import Endpoint
from memory.errors import ConfigError, EngineError
from serve.engine_settings import (
    BASE_NAME,
    EngineConfig,
    engine_arguments,
    engine_environment,
    fitting_dtype,
    has_gpu,
    vllm_version,
)

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = Path(__file__).resolve().with_name("vllm_launcher.py")

_ERROR = re.compile(r"\b\w*(Error|Exception): ")
Status = Literal["stopped", "starting", "ready", "resting", "restarting", "failed"]


class EngineUnreachableError(EngineError):
    """Nothing answers at the engine's address; it may be starting again."""


async def request(endpoint: Endpoint, method: str, path: str, payload: Any = None, *, timeout: float = 30.0) -> Any:
    """One call (`/v1/models`, `/health`); the decoded JSON, or text. EngineError unless
    it answers 2xx (EngineUnreachableError: nothing answers at all)."""
    import httpx

    url = f"{endpoint.base_url.removesuffix('/v1')}{path}"
    # The engine sits on loopback: no proxy from the environment, and no TLS set-up for plain HTTP.
    plain = url.startswith("http://")
    try:
        async with httpx.AsyncClient(timeout=timeout, trust_env=not plain, verify=not plain) as client:
            headers = {"Authorization": f"Bearer {endpoint.api_key}"}
            reply = await client.request(method, url, json=payload, headers=headers)
    except httpx.HTTPError as exc:
        raise EngineUnreachableError(
            f"the engine does not answer at {url}: {type(exc).__name__} {exc}".rstrip()
        ) from exc
    if reply.is_error:
        raise EngineError(f"the engine answered {reply.status_code} to {method} {path}: {_error_text(reply.text)}")
    try:
        return reply.json()
    except ValueError:
        return reply.text


def _error_text(body: str) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return body.strip()[:300]


class Engine:
    """One engine for one service. All methods belong to the event loop that called `start`;
    the properties and `wait_ready` may be used from any loop.
    """

    def __init__(self, config: EngineConfig, *, model: Path, data_dir: Path) -> None:
        self.config = config
        self.status: Status = "stopped"
        self.restarts = 0
        self.on_ready: Callable[[], Awaitable[None]] | None = None
        """Awaited after every (re)start, before the status turns `ready`."""
        self._model = model
        self._data_dir = data_dir
        self._log = data_dir / "engine.log"
        self._pid_file = data_dir / "engine.pid"
        self._port = 0
        self._key = config.api_key or "none"
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._why_failed = ""
        self.name = f"vllm at {config.url}" if config.url else "vllm"

    @property
    def base_url(self) -> str:
        """URL up to and with `/v1`; a restarted engine may have moved, so ask at every call."""
        if self.config.url:
            url = self.config.url.rstrip("/")
            return url if url.endswith("/v1") else f"{url}/v1"
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def api_key(self) -> str:
        """The key of the present start."""
        return self._key

    @property
    def pid(self) -> int | None:
        """The engine's leading process, which is also its process group."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Begin to start; returns at once (see `wait_ready`). ConfigError when there is nothing to start."""
        if self._task is not None:
            return
        if self.config.url is None:
            python = self._python()
            if not python.exists():
                raise ConfigError(
                    f"there is no engine at {python}: run `make setup`, or set engine.url or engine.python"
                )
            self._data_dir.mkdir(parents=True, exist_ok=True)
            end_leftover(self._pid_file)
        self.status = "starting"
        self._task = asyncio.create_task(self._attach() if self.config.url else self._supervise())

    async def stop(self) -> None:
        """End the engine and all its processes."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        await self._end(patience_s=10.0)
        self.status = "stopped"

    async def wait_ready(self, timeout: float | None = None) -> None:
        """Return once the model can be called. EngineError when it failed, was stopped or takes too long."""
        limit = self.config.start_timeout_s if timeout is None else timeout
        deadline = time.monotonic() + limit
        while self.status != "ready":
            if self.status == "failed":
                raise EngineError(self._why_failed)
            if self.status == "stopped":
                raise EngineError("the engine is stopped")
            if time.monotonic() > deadline:
                raise EngineError(f"the engine is still {self.status} after {limit:.0f} s; see {self._log}")
            await asyncio.sleep(0.05)

    def log_tail(self, lines: int = 3) -> str:
        """What the engine's log says about its end: the last error of this start, else its last lines."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, self._log.stat().st_size - 65_536))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        told = [line.strip()[:400] for line in text.rpartition("\n== ")[2].splitlines()[1:] if line.strip()]
        errors = [line for line in told if _ERROR.search(line)]
        return " | ".join(errors[-1:] or told[-lines:])

    async def _supervise(self) -> None:
        """Start, watch, start again: until cancelled or dying too often."""
        deaths: list[float] = []
        while True:
            why = await self._one_life()
            deaths = [at for at in deaths if at > time.monotonic() - self.config.restart_window_s]
            deaths.append(time.monotonic())
            tail = self.log_tail()
            log.warning("the engine ended (%s): %s", why, tail)
            if len(deaths) > self.config.max_restarts:
                self._fail(f"the engine died {len(deaths)} times ({why}); see {self._log}: {tail}")
                return
            self.status = "restarting"
            await asyncio.sleep(min(self.config.backoff_s * 2 ** (len(deaths) - 1), 30.0))
            self.restarts += 1

    async def _one_life(self) -> str:
        """From start to death; why it ended."""
        try:
            self._process = await self._spawn()
            exited = asyncio.create_task(self._process.wait())
            try:
                return await self._watch(exited)
            finally:
                exited.cancel()
        except OSError as exc:
            return f"it cannot be started: {exc}"
        finally:
            if self.status == "ready":
                self.status = "restarting"
            # Also when only the leader died: its workers hold memory and cores.
            await self._end(patience_s=0.0)

    async def _watch(self, exited: asyncio.Task[int]) -> str:
        started = answered = time.monotonic()
        ready = False
        while True:
            pause = self.config.health_every_s if ready else 0.2
            await asyncio.wait([exited], timeout=pause)
            if exited.done():
                return f"exit code {exited.result()}"
            now = time.monotonic()
            if await self._healthy():
                answered = now
                if not ready:
                    ready = True
                    await self._tell_ready()
            elif not ready and now - started > self.config.start_timeout_s:
                return f"not ready after {self.config.start_timeout_s:.0f} s"
            elif ready and now - answered > self.config.health_patience_s:
                return f"no answer for {self.config.health_patience_s:.0f} s"

    async def _tell_ready(self) -> None:
        if self.on_ready is not None:
            try:
                await self.on_ready()
            except EngineError as exc:
                # The base model serves; whoever asks for the adapter meets the error there.
                log.warning("the engine is up, but an adapter could not be put back: %s", exc)
        self.status = "ready"

    async def _healthy(self) -> bool:
        try:
            await request(self, "GET", "/health", timeout=min(self.config.health_patience_s, 10.0))
        except EngineError:
            return False
        return True

    async def _attach(self) -> None:
        """Watch an external engine: `ready` while it lists our model, `restarting` while it does not."""
        started = time.monotonic()
        while True:
            try:
                await self._find_model()
                if self.status != "ready":
                    await self._tell_ready()
            except (EngineError, KeyError, TypeError) as exc:
                if self.status == "ready":
                    self.status, started = "restarting", time.monotonic()
                    self.restarts += 1
                if time.monotonic() - started > self.config.start_timeout_s:
                    self._fail(f"the engine at {self.config.url} cannot be used: {exc}")
                    return
            await asyncio.sleep(self.config.health_every_s if self.status == "ready" else 0.5)

    async def _find_model(self) -> None:
        models = await request(self, "GET", "/v1/models", timeout=10.0)
        if BASE_NAME not in [card["id"] for card in models["data"]]:
            raise EngineError(f"it does not serve {BASE_NAME!r}: start it with --served-model-name {BASE_NAME}")

    def _fail(self, why: str) -> None:
        self._why_failed = why
        self.status = "failed"
        log.error("%s", why)

    def _python(self) -> Path:
        return self.config.python or ROOT / ".engine" / "bin" / "python"

    async def _spawn(self) -> asyncio.subprocess.Process:
        python = self._python()
        self._key = secrets.token_urlsafe(32)
        self._port = free_port(self._port)
        on_gpu = self.config.device == "gpu" or (self.config.device == "auto" and has_gpu(python))
        dtype = self.config.dtype if self.config.dtype != "auto" else fitting_dtype(on_gpu)
        self.name = f"{vllm_version(python)} ({'gpu' if on_gpu else 'cpu'}, {dtype})"
        arguments = engine_arguments(self.config, self._model, self._port, on_gpu, dtype)
        env = engine_environment(self.config, self._key, self._data_dir, on_gpu)
        if self._log.exists() and self._log.stat().st_size > 10_000_000:
            self._log.replace(self._log.with_suffix(".log.1"))
        with self._log.open("ab") as output:
            output.write(f"\n== {time.strftime('%F %T')} {self.name} on port {self._port}\n".encode())
            output.flush()
            process = await asyncio.create_subprocess_exec(
                str(python),
                "-P",
                str(LAUNCHER),
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
            )
        self._pid_file.write_text(json.dumps({"pid": process.pid, "created": _created(process.pid)}))
        return process

    async def _end(self, patience_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if patience_s and process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()
        self._pid_file.unlink(missing_ok=True)


def free_port(wanted: int = 0) -> int:
    """`wanted` when it is free, else any free port on loopback."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise EngineError("no free port on 127.0.0.1")


def end_leftover(pid_file: Path) -> None:
    """Kill the engine of a service that died without taking it along.

    The engine's own watch does the same within a second; this is for one that was stopped or stuck.
    """
    try:
        left = json.loads(pid_file.read_text())
        if left["created"] is not None and _created(left["pid"]) == left["created"]:
            _signal_group(left["pid"], signal.SIGKILL)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    pid_file.unlink(missing_ok=True)


def _created(pid: int) -> float | None:
    """When the process began: with its pid, an identity that the system never reuses."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
