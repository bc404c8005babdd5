"""`nightschool keys create | list | revoke`: API keys, made straight in the ledger, whether or not a service runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from memory.database import Database

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
out = Console()


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="whose key it is; signs the feedback given with it")],
    tenant: Annotated[str, typer.Option(help="owns all that the key makes or reads")] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="chat, batch, feedback, memory, operate or admin; repeatable (default: chat, feedback)"),
    ] = None,
    expires_in: Annotated[str | None, typer.Option(help="such as 12h, 30d or 4w; default: never")] = None,
    rpm: Annotated[int | None, typer.Option(help="requests per minute; default: no limit")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="requests at once; default: no limit")] = None,
    vouches: Annotated[
        bool, typer.Option("--vouches", help="for an application: the authors it names count as so many voices")
    ] = False,
) -> None:
    """Make a key and print its secret, this once: the ledger keeps a hash."""
    from memory import keys
    from serve.api.keys import DEFAULT_SCOPES, expiry, new_key

    key = new_key(
        name=name,
        tenant=tenant,
        scopes=scope or DEFAULT_SCOPES,
        expires_at=expiry(expires_in),
        requests_per_minute=rpm,
        max_concurrent=max_concurrent,
        vouches=vouches,
    )
    with _database(context) as database:
        secret = keys.mint(database, key)
    # Alone on stdout, so that a script can take it: KEY=$(nightschool keys create …)
    Console(stderr=True).print(f"key {key.id} for {key.name!r} ({', '.join(key.scopes)}), shown this once:")
    print(secret)


@app.command("list")
def show(context: typer.Context) -> None:
    """List all keys, without their secrets."""
    from memory import keys
    from memory.records import now

    table = Table("id", "name", "tenant", "scopes", "per minute", "at once", "expires", "state")
    with _database(context) as database:
        for key in keys.all_keys(database):
            table.add_row(
                key.id,
                key.name,
                key.tenant,
                ", ".join(key.scopes),
                str(key.requests_per_minute or "-"),
                str(key.max_concurrent or "-"),
                f"{key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "never",
                "valid" if key.usable(now()) else "revoked" if key.revoked_at else "expired",
            )
    out.print(table)


@app.command()
def revoke(context: typer.Context, key_id: Annotated[str, typer.Argument(help="key_…, as listed")]) -> None:
    """End a key for good; a running service follows within seconds."""
    from memory import keys

    with _database(context) as database:
        revoked = keys.revoke(database, key_id)
    out.print(f"key {revoked.id} of {revoked.name!r} is revoked")


@contextmanager
def _database(context: typer.Context) -> Iterator[Database]:
    from serve.settings import load_settings
    from serve.wiring import open_ledger

    ledger = open_ledger(load_settings(**context.obj))
    try:
        yield ledger.database
    finally:
        ledger.close()
