"""The CLI's way to the service: the one that runs on the data folder, or one started for the command.

Every command that needs the engine goes through the public API, so there is one code path and one owner
of the data folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from memory.errors import ConfigError, EngineError, ModelError, NightschoolError, NotFoundError
from serve.settings import Settings
from serve.wiring import running_service

START_TIMEOUT_S = 900.0
SERVER_LOG = "service.log"


class Client:
    """The service's HTTP API with its errors as ours."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        self.token = token
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(600.0, connect=5.0))

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """The reply's JSON. NightschoolError with the service's own message; EngineError when it is gone."""
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.TransportError as exc:
            raise _gone(self.url, exc) from exc
        try:
            body = response.json()
        except ValueError as exc:
            raise ModelError(f"the service answered {response.status_code} without JSON") from exc
        if response.status_code >= 400 and "error" in body:
            kind: type[NightschoolError] = {404: NotFoundError, 503: EngineError}.get(response.status_code, ConfigError)
            raise kind(body["error"]["message"])
        return body

    def get(self, path: str, **params: Any) -> Any:
        """GET."""
        return self.call("GET", path, params=params)

    def post(self, path: str, body: dict[str, Any], key: str | None = None) -> Any:
        """POST with an optional idempotency key."""
        return self.call("POST", path, json=body, headers={"Idempotency-Key": key} if key else None)

    def upload(self, path: Path, name: str, purpose: str) -> Any:
        """Upload a file under a name."""
        with path.open("rb") as file:
            return self.call("POST", "/v1/files", files={"file": (name, file)}, data={"purpose": purpose})

    def lines(self, path: str) -> Iterator[str]:
        """The lines of a text, as they come. EngineError when the service goes away on the way."""
        try:
            with self._http.stream("GET", path) as response:
                if response.status_code >= 400:
                    raise NotFoundError(f"the service answered {response.status_code} to {path}")
                yield from response.iter_lines()
        except httpx.TransportError as exc:
            raise _gone(self.url, exc) from exc

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _gone(url: str, exc: Exception) -> EngineError:
    return EngineError(f"the service at {url} does not answer ({type(exc).__name__}); the same command again goes on")


@contextmanager
def connect(
    settings: Settings, say: Callable[[str], None], variables: Mapping[str, str] | None = None
) -> Iterator[Client]:
    """A client of the running service; when there is none, of one that lives as long as the command.

    `variables`: settings of that one, as environment variables, where the user has not set them. Returns
    once the engine answers. EngineError, with the log's last line, when it does not come up.
    """
    info = running_service(settings.data_dir)
    process = None if info else _spawn(settings, variables or {})
    try:
        info = info or _info_of(process, settings, say)
        client = Client(info["url"], info.get("token"))
        try:
            _wait_ready(client, process, settings, say)
            yield client
        finally:
            client.close()
    finally:
        if process is not None:
            stop(process)


def _spawn(settings: Settings, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    log = (settings.data_dir / SERVER_LOG).open("ab")
    command = [sys.executable, "-m", "serve.cli", "--data-dir", str(settings.data_dir), "serve"]
    command += ["--host", "127.0.0.1", "--port", "0", "--background"]
    environment = {**variables, **os.environ}
    return subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=environment
    )


def _info_of(process: subprocess.Popen[bytes] | None, settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    say("starting the service")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if (info := running_service(settings.data_dir)) is not None:
            return info
        _check_alive(process, settings)
        time.sleep(0.2)
    raise EngineError(f"the service did not start in {START_TIMEOUT_S:.0f} s; see {settings.data_dir / SERVER_LOG}")


def _wait_ready(
    client: Client, process: subprocess.Popen[bytes] | None, settings: Settings, say: Callable[[str], None]
) -> None:
    deadline, told = time.monotonic() + START_TIMEOUT_S, None
    while time.monotonic() < deadline:
        _check_alive(process, settings)
        try:
            state = client.get("/readyz")
        except EngineError:
            state = {"engine": "starting"}
        if state.get("status") == "ready":
            return
        if state.get("engine") == "failed":
            raise EngineError(f"the engine does not start; see {settings.data_dir / 'engine.log'}")
        if (engine := state.get("engine")) != told:
            say(f"the engine is {engine}")
            told = engine
        time.sleep(0.5)
    raise EngineError(f"the engine was not ready in {START_TIMEOUT_S:.0f} s; see {settings.data_dir / 'engine.log'}")


def _check_alive(process: subprocess.Popen[bytes] | None, settings: Settings) -> None:
    if process is not None and process.poll() is not None:
        raise EngineError(f"the service ended while starting: {last_line(settings.data_dir / SERVER_LOG)}")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1][:500] if lines else f"nothing in {log}"


def stop(process: subprocess.Popen[bytes], patience_s: float = 30.0) -> None:
    """End a service that was started here, engine included."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
