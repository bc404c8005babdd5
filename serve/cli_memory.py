"""`nightschool memory …`: what a tenant remembers, looked at and changed straight in the ledger.

Works whether or not a service runs. Searching scans the ledger, since the index has one owner. Only making the index
anew and forgetting go through the service where there is one; where there is none, the command owns the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memory.errors import ConfigError, NightschoolError, boundary

if TYPE_CHECKING:
    from memory.index import Index
    from memory.ledger import Ledger
    from memory.uplift import Count
    from serve.client import Client
    from serve.settings import Settings

app = typer.Typer(help="Search, show and change what is remembered.", no_args_is_help=True)
out = Console()
err = Console(stderr=True)

Tenant = Annotated[str, typer.Option(help="whose memory")]
Workload = Annotated[str | None, typer.Option(help="only of this workload")]
Kind = Literal["principle", "run"]
Status = Literal["active", "merged", "retired", "internalised"]
Why = Annotated[str, typer.Option(help="kept in the item's history")]
ItemId = Annotated[str, typer.Argument(help="prin_… or run_…, as a search shows it")]


@app.command()
def search(
    context: typer.Context,
    text: str,
    tenant: Tenant = "default",
    workload: Workload = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 10,
) -> None:
    """The items nearest to a text, nearest first."""
    from memory.embed import load_embedder
    from memory.search import by_scan
    from memory.search import search as nearest_items

    with ledger_of(context) as (settings, ledger):
        nearest = by_scan(ledger, load_embedder(settings.embedder, settings.data_dir / "embedder"))
        hits = nearest_items(ledger, nearest, text, tenant=tenant, workload=workload, limit=limit)
    table = Table("id", "similarity", "score", "status", "workload", "text")
    for hit in hits:
        item = hit.item
        figures = f"{hit.similarity:.2f}", f"{item.score:.2f}"
        table.add_row(item.id, *figures, item.status.value, escape(item.workload), escape(_short(item)))
    out.print(table)


@app.command("list")
def list_items(
    context: typer.Context,
    tenant: Tenant = "default",
    workload: Workload = None,
    kind: Annotated[Kind | None, typer.Option("--type")] = None,
    status: Annotated[Status | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 100,
) -> None:
    """The items in the order they were added, those that retired or were merged included."""
    from memory import shelf
    from memory.records import MemoryKind, MemoryStatus

    with ledger_of(context) as (_, ledger):
        found = shelf.page(
            ledger.database,
            tenant=tenant,
            kind=MemoryKind(kind) if kind else None,
            status=MemoryStatus(status) if status else None,
            workload=workload,
            limit=limit,
        )
    table = Table("id", "score", "uses", "status", "pinned", "workload", "text")
    for item in found:
        figures = f"{item.score:.2f}", str(item.uses), item.status.value, "yes" if item.pinned else ""
        table.add_row(item.id, *figures, escape(item.workload), escape(_short(item)))
    out.print(table)


@app.command()
def why(
    context: typer.Context,
    run_id: Annotated[str, typer.Argument(help="a reply's id (chatcmpl-…, resp_…) or its run's (traj_…)")],
    tenant: Tenant = "default",
) -> None:
    """What memory did for one reply: why each item was recalled, what it cost, and whether it helped, as JSON."""
    from serve.api.memory import recollection_object

    with ledger_of(context) as (_, ledger):
        out.print_json(data=recollection_object(ledger.database, run_id, tenant))


@app.command()
def show(context: typer.Context, item_id: ItemId, tenant: Tenant = "default") -> None:
    """One item with its figures and its history, as JSON."""
    from serve.api.memory import item_in_full

    with ledger_of(context) as (_, ledger):
        out.print_json(data=item_in_full(ledger.database, item_id, tenant))


@app.command()
def add(
    context: typer.Context,
    text: str,
    kind: Annotated[str, typer.Option(help="guiding (what to do) or cautionary (what to avoid)")] = "guiding",
    tenant: Tenant = "default",
    workload: Annotated[str, typer.Option(help="noted with it")] = "default",
    pinned: Annotated[bool, typer.Option("--pinned", help="whatever its figures come to")] = False,
) -> None:
    """Write a principle by hand; prints its id."""
    from pydantic import ValidationError

    from memory.records import Principle
    from serve.api.memory import NewPrinciple

    try:
        given = NewPrinciple.model_validate({"text": text, "kind": kind, "workload": workload, "pinned": pinned})
    except ValidationError as exc:
        first = exc.errors()[0]
        raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from exc
    principle = Principle(tenant=tenant, **given.model_dump())
    with ledger_of(context) as (settings, ledger):
        ledger.add_principle(principle)
    follow(settings)
    out.print(principle.id, highlight=False)


@app.command()
def edit(context: typer.Context, item_id: ItemId, text: str, tenant: Tenant = "default", why: Why = "by hand") -> None:
    """Give a principle other words; its evidence stays."""
    from memory import shelf

    with ledger_of(context) as (settings, ledger):
        shelf.reword(ledger.database, item_id, text, _signed(why), tenant=tenant)
    follow(settings)
    out.print(f"{item_id} is reworded")


@app.command()
def pin(context: typer.Context, item_id: ItemId, tenant: Tenant = "default", why: Why = "by hand") -> None:
    """Keep an item, whatever its score and uplift come to."""
    _pin(context, item_id, tenant, why, True)


@app.command()
def unpin(context: typer.Context, item_id: ItemId, tenant: Tenant = "default", why: Why = "by hand") -> None:
    """Let an item's figures decide again."""
    _pin(context, item_id, tenant, why, False)


@app.command()
def retire(context: typer.Context, item_id: ItemId, tenant: Tenant = "default", why: Why = "by hand") -> None:
    """Recall an item no more."""
    _move(context, item_id, tenant, why, "retired")


@app.command()
def restore(context: typer.Context, item_id: ItemId, tenant: Tenant = "default", why: Why = "by hand") -> None:
    """Recall a retired or internalised item again."""
    _move(context, item_id, tenant, why, "active")


@app.command("export")
def export_items(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="JSONL, one item a line")],
    tenant: Tenant = "default",
    workload: Workload = None,
) -> None:
    """Write the memory of a tenant to a file, which `import` takes again."""
    from memory.exchange import export_lines

    written = 0
    with ledger_of(context) as (_, ledger), boundary(ConfigError, f"cannot write {file}"), file.open("wb") as target:
        for line in export_lines(ledger.database, tenant=tenant, workload=workload):
            target.write(line.encode() + b"\n")
            written += 1
    err.print(f"{written} items")


@app.command("import")
def import_items(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="as `export` writes it")],
    tenant: Tenant = "default",
) -> None:
    """Add exported items, all or none; those that are there already stay as they are."""
    from memory.exchange import import_lines

    with (
        ledger_of(context) as (settings, ledger),
        boundary(ConfigError, f"cannot import {file}"),
        # Lines end as they were written: universal newlines would break texts that hold other ends.
        file.open(encoding="utf-8", newline="\n") as lines,
    ):
        done = import_lines(ledger.database, lines, tenant=tenant)
    follow(settings)
    out.print(f"{done.added} added, {done.known} known already")


@app.command()
def stats(context: typer.Context, tenant: Tenant = "default", workload: Workload = None) -> None:
    """What there is, what each item is worth, and what prompts cost from generation to generation."""
    from memory import stats as figures

    with ledger_of(context) as (_, ledger):
        counts = figures.counts(ledger.database, tenant=tenant, workload=workload)
        worths = figures.worths(ledger.database, tenant=tenant, workload=workload)
        costs = figures.prompt_costs(ledger.database, tenant=tenant, workload=workload)
    table = Table("type", "status", "items")
    for (kind, status), n in sorted(counts.items()):
        table.add_row(kind.value, status.value, str(n))
    out.print(table)
    table = Table("id", "with it", "without", "uplift (95%)", "status", "text")
    for worth in worths:
        measured, seen = worth.uplift, worth.exposure
        shown = "-" if measured is None else f"{measured.value:+.2f} ({measured.low:+.2f} to {measured.high:+.2f})"
        row = worth.item.id, _runs(seen.shown), _runs(seen.withheld), shown, worth.item.status.value
        table.add_row(*row, escape(_short(worth.item)))
    out.print(table)
    table = Table("generation", "runs", "prompt tokens", "recalled")
    for cost in costs:
        table.add_row(str(cost.generation), str(cost.runs), f"{cost.prompt_tokens:.0f}", f"{cost.recalled:.2f}")
    out.print(table)


@app.command()
def reindex(context: typer.Context) -> None:
    """Make the index of all tenants anew from the ledger; a running service answers meanwhile."""
    from memory.index import rebuild

    with ledger_of(context) as (settings, ledger), _service(settings) as client:
        if client is not None:
            done = client.post("/v1/memory/reindex", {})["items"]
        else:
            with _own_index(settings) as index:
                done = rebuild(ledger, index)
    out.print(f"the index holds {done} items")


@app.command()
def forget(
    context: typer.Context,
    tenant: Annotated[str, typer.Option(help="whose data")],
    user: Annotated[str | None, typer.Option(help="only what this user of the tenant asked and said")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Delete a tenant's or a user's data everywhere; says which generations had learned from it."""
    from memory.forget import forget as forget_data
    from memory.index import rebuild
    from serve.api.auth import OPERATOR
    from serve.api.memory import forgotten_object

    if user == "":
        raise ConfigError("--user names nobody: give a name, or leave it out to forget the whole tenant")
    whose = f"all data of tenant {tenant!r}" if user is None else f"all data of user {user!r} of tenant {tenant!r}"
    if not yes:
        typer.confirm(f"Delete {whose} for good?", abort=True)
    with ledger_of(context) as (settings, ledger), _service(settings) as client:
        if client is not None:
            done = client.post("/v1/memory/forget", {"tenant": tenant} | ({} if user is None else {"user": user}))
        else:
            with _own_index(settings) as index:
                found = forget_data(ledger.database, settings.data_dir, tenant=tenant, user=user, by=OPERATOR)
                rebuild(ledger, index)
            done = forgotten_object(found)
    out.print_json(data=done)


def _pin(context: typer.Context, item_id: str, tenant: str, why: str, pinned: bool) -> None:
    from memory import shelf

    with ledger_of(context) as (_, ledger):
        shelf.set_pinned(ledger.database, item_id, pinned, _signed(why), tenant=tenant)
    out.print(f"{item_id} is {'pinned' if pinned else 'not pinned'}")


def _move(context: typer.Context, item_id: str, tenant: str, why: str, status: str) -> None:
    from memory import shelf
    from memory.records import MemoryStatus

    with ledger_of(context) as (settings, ledger):
        shelf.set_status(ledger.database, item_id, MemoryStatus(status), _signed(why), tenant=tenant)
    follow(settings)
    out.print(f"{item_id} is {status}")


def _signed(why: str) -> str:
    from serve.api.auth import OPERATOR

    return f"{OPERATOR}: {why}"


def _short(item: Any) -> str:
    from memory.records import Principle

    return (item.text if isinstance(item, Principle) else item.question)[:120]


def _runs(count: Count) -> str:
    return f"{count.successes} of {count.n}" if count.n else "-"


def follow(settings: Settings) -> None:
    """Let a running service's index follow what was just changed; without one, the next start does."""
    with _service(settings) as client:
        if client is not None:
            # It is in the ledger: an index that is being made anew takes it in by itself.
            with suppress(NightschoolError):
                client.post("/v1/memory/reindex", {"anew": False})


@contextmanager
def ledger_of(context: typer.Context) -> Iterator[tuple[Settings, Ledger]]:
    from serve.settings import load_settings
    from serve.wiring import open_ledger

    settings = load_settings(**context.obj)
    ledger = open_ledger(settings)
    try:
        yield settings, ledger
    finally:
        ledger.close()


@contextmanager
def _service(settings: Settings) -> Iterator[Client | None]:
    """The running service; None where there is none. One is not started for this: it would load a model for nothing."""
    from serve.client import Client
    from serve.wiring import running_service

    info = running_service(settings.data_dir)
    client = Client(info["url"], info.get("token")) if info else None
    try:
        yield client
    finally:
        if client is not None:
            client.close()


@contextmanager
def _own_index(settings: Settings) -> Iterator[Index]:
    """The index, owned by this command. IndexUnavailableError when another process has it."""
    from memory.embed import load_embedder
    from memory.index import Index

    embedder = load_embedder(settings.embedder, settings.data_dir / "embedder")
    index = Index.open(settings.data_dir / "index", embedder, chroma=settings.chroma)
    try:
        yield index
    finally:
        index.close()
