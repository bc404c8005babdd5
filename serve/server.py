"""Runs the service: parts, nights, app, Uvicorn. The socket is bound first, so that a used port is one clear line."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket

from memory.errors import ConfigError
from serve.settings import Settings

BACKLOG = 2048
DRAIN_S = 30


def serve_forever(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, then drain. NightschoolError when it cannot start."""
    listener = bind(settings.server.host, settings.server.port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "LiteLLM", "chromadb", "dbos", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    asyncio.run(_serve(settings, listener))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket on a loopback address; ConfigError when the address is public or taken."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(f"host {host!r} is not a loopback address: this version has no keys yet, so it stays private")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as exc:
        listener.close()
        raise ConfigError(f"port {port} on {host} cannot be used ({exc.strerror}); choose another with --port") from exc
    listener.listen(BACKLOG)
    return listener


async def _serve(settings: Settings, listener: socket.socket) -> None:
    import uvicorn

    from serve import batch_run, durable
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
            config = uvicorn.Config(
                create_app(services, nights),
                lifespan="off",
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=DRAIN_S,
            )
            # Uvicorn raises the signal that stopped it once more after draining; by default that would
            # end the process before the engine is stopped.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: None)
            host, port = listener.getsockname()[:2]
            announce(settings.data_dir, f"http://{host}:{port}")
            log.info("OpenAI-compatible endpoint on http://%s:%s/v1", host, port)
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            await asyncio.to_thread(durable.shut_down)
