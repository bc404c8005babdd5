"""DBOS, started once for all durable workflows (nights, batches), and the running parts that they work on.

A workflow is a module's function, registered when the module is imported; it finds the service through
`services()`, because what DBOS stores of a call must be plain data.
"""

from __future__ import annotations

from dbos import DBOS, DBOSConfig

from serve.wiring import Services

_running: Services | None = None


def services() -> Services:
    """The running parts, inside a workflow."""
    assert _running is not None, "no service is running in this process"
    return _running


def launch(parts: Services) -> None:
    """Start DBOS on its database: unfinished workflows of the last process go on by themselves."""
    global _running
    _running = parts
    url = f"sqlite:///{(parts.settings.data_dir / 'dbos.sqlite').resolve()}"
    config: DBOSConfig = {
        "name": "nightschool",
        "system_database_url": url,
        "application_version": "1",
        "log_level": "WARNING",
    }
    DBOS(config=config)
    DBOS.launch()


def shut_down() -> None:
    """Stop DBOS; unfinished workflows go on at the next start."""
    global _running
    DBOS.destroy(destroy_registry=False)
    _running = None
