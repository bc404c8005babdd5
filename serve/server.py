"""Runs the service: parts, nights, app, Uvicorn. The socket is bound first, so that a used port is one clear line."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import signal
import socket
import time
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import datetime, timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from memory.errors import ConfigError
from memory.keys import mint_first
from memory.ledger import Ledger
from serve import schedule
from serve.api.middleware import Gate
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.night import NightSchool

BACKLOG = 2048
DRAIN_S = 30.0
CUT_S = 2
"""What still runs after draining is cancelled this many seconds later."""
KEEP_ALIVE_S = 75
"""An idle connection stays open longer than clients keep theirs (httpx and the OpenAI SDK: 5 s). At Uvicorn's own
5 s both give up at once, and a request sent in that moment is lost: "Server disconnected"."""

FIRST_KEY = """
The admin key of this service, shown this once (`nightschool keys create` makes others):

    {}
"""


def serve_forever(settings: Settings, *, background: bool = False) -> None:
    """Serve until SIGINT or SIGTERM, then drain. NightschoolError when it cannot start.

    Where there has never been a key, one is made and printed. `background`: a command starts it for itself. It keeps no
    eye on the output, where a key would be lost, and a night begun by the clock would end with the command.
    """
    listener = bind(settings.server.host, settings.server.port, keys=settings.server.keys)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "LiteLLM", "chromadb", "dbos", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    import uvloop

    uvloop.run(_serve(settings, listener, background))


def bind(host: str, port: int, *, keys: bool = True) -> socket.socket:
    """A listening socket; ConfigError when the address cannot be used, or is public while there are no keys."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not keys and not loopback:
        raise ConfigError(f"host {host!r} is not a loopback address: without keys (--insecure) a service stays private")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        said = f"port {port} on {host} cannot be used ({exc.strerror}); choose another with --port or --host"
        raise ConfigError(said) from exc
    listener.listen(BACKLOG)
    return listener


def local_url(listener: socket.socket) -> str:
    """The URL under which this machine reaches the socket, also one that listens on all addresses."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if address.version == 6 else f"http://{host}:{port}"


def uvicorn_config(app: Any, log_level: str) -> Any:
    """How Uvicorn serves the app, in the product and in its tests."""
    import uvicorn

    return uvicorn.Config(
        app,
        lifespan="off",
        log_level=log_level,
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CUT_S,
    )


def drain_first(server: Any, gate: Gate, loop: asyncio.AbstractEventLoop) -> None:
    """On the first signal a Uvicorn server refuses new requests (503) and stops once the running ones have ended,
    or after `DRAIN_S` seconds; on the second it stops at once."""
    stop = server.handle_exit

    async def drain(number: int) -> None:
        deadline = time.monotonic() + DRAIN_S
        while gate.inside and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        stop(number, None)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if gate.draining:
            stop(number, frame)
            return
        gate.draining = True
        asyncio.run_coroutine_threadsafe(drain(number), loop)

    server.handle_exit = on_signal


async def _serve(settings: Settings, listener: socket.socket, background: bool) -> None:
    import uvicorn

    from serve import batch_run, durable, watching
    from serve.api.app import create_app
    from serve.night import NightSchool
    from serve.wiring import announce, build

    log = logging.getLogger("nightschool")
    async with build(settings, log.info) as services:
        await asyncio.to_thread(durable.launch, services)
        nights = NightSchool(services)
        try:
            await asyncio.to_thread(nights.resume)
            await asyncio.to_thread(batch_run.resume, services)
            if settings.server.keys and not background:
                await asyncio.to_thread(_print_first_key, services.ledger)
            token = secrets.token_urlsafe(32)
            app = create_app(services, nights, token)
            config = uvicorn_config(app, "warning")
            # Uvicorn raises the signal that stopped it once more after draining; by default that would
            # end the process before the engine is stopped.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)
            server = uvicorn.Server(config)
            drain_first(server, app.state.gate, asyncio.get_running_loop())
            url = local_url(listener)
            announce(settings.data_dir, url, token)
            log.info("OpenAI-compatible endpoint on %s/v1", url)
            async with _by_the_clock(settings, nights, background), watching.kept(services):
                await server.serve(sockets=[listener])
        finally:
            await asyncio.to_thread(durable.shut_down)


def _by_the_clock(settings: Settings, nights: NightSchool, background: bool) -> AbstractAsyncContextManager[None]:
    if background:
        return nullcontext()
    cron, catch_up = settings.night.schedule, timedelta(seconds=settings.night.catch_up_s)
    since = schedule.in_force_since(settings.data_dir, cron, datetime.now())

    def settled() -> datetime:
        return max(since, nights.last_at_work() or since)

    return schedule.kept(cron, lambda: nights.start({}), settled, catch_up)


def _print_first_key(ledger: Ledger) -> None:
    secret = mint_first(ledger.database)
    if secret is not None:
        print(FIRST_KEY.format(secret), flush=True)
