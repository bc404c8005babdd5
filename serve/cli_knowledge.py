"""`nightschool knowledge …`: documents that the agent's `search_knowledge` reads, kept straight in the ledger.

Works whether or not a service runs; a running one finds what was added at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memory.errors import ConfigError, LedgerError, NightschoolError, boundary
from serve.cli_memory import follow, ledger_of

if TYPE_CHECKING:
    from memory.reading import KnowledgeConfig

app = typer.Typer(
    help="Give the agent documents to read: it searches them where its tools include search_knowledge "
    '(setting agent.tools, or "tools" of a task).',
    no_args_is_help=True,
)
out = Console()
err = Console(stderr=True)

Tenant = Annotated[str, typer.Option(help="whose documents")]
DocumentId = Annotated[str, typer.Argument(help="doc_…, as `list` shows it")]


@app.command()
def add(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(help="files, or folders with all that is in them")],
    workload: Annotated[str | None, typer.Option(help="only runs of this workload find them")] = None,
    tenant: Tenant = "default",
    user: Annotated[str | None, typer.Option(help="on whose behalf: forgetting this user deletes them")] = None,
) -> None:
    """Read text, Markdown, HTML, PDF and JSONL (a line: a text, or an object with "text").

    A file that changed replaces what it said before; the same content again is left alone. A file that cannot be
    read is told on a line of its own, the others are added all the same, and the exit code is 2.
    """
    from memory.documents import bring
    from serve.api.auth import OPERATOR

    broken = 0
    with ledger_of(context) as (settings, ledger):
        for path, reason in _files(paths):
            try:
                if reason is not None:
                    raise ConfigError(reason)
                document, fate = bring(
                    ledger.database,
                    _bytes(path, settings.knowledge),
                    settings.knowledge,
                    name=path.name,
                    tenant=tenant,
                    source=_source(path),
                    by=OPERATOR,
                    workload=workload,
                    user=user,
                )
            except LedgerError:
                raise
            except NightschoolError as exc:
                broken += 1
                err.print(f"{_source(path)}: {exc}", style="red", markup=False, highlight=False, soft_wrap=True)
                continue
            passages = f"{document.chunks} passage{'s' if document.chunks != 1 else ''}"
            said = f"{fate.value:9}  {document.id}  {passages}  {document.source}"
            out.print(said, markup=False, highlight=False, soft_wrap=True)
        follow(settings)
    if broken:
        raise ConfigError(f"{broken} could not be added")


@app.command("list")
def list_documents(context: typer.Context, tenant: Tenant = "default") -> None:
    """All documents, in the order they were first added."""
    from memory.documents import page

    table = Table("id", "form", "passages", "workload", "title", "source")
    after, more = None, True
    with ledger_of(context) as (_, ledger):
        while more:
            found, more = page(ledger.database, tenant=tenant, after=after, limit=500)
            after = found[-1].id if found else None
            for d in found:
                named = (escape(text or "-") for text in (d.workload, d.title, d.source))
                table.add_row(d.id, d.form.value, str(d.chunks), *named)
    out.print(table)


@app.command()
def show(context: typer.Context, document_id: DocumentId, tenant: Tenant = "default") -> None:
    """One document with the passages that were read from it, as JSON."""
    from memory.documents import get
    from serve.api.knowledge import document_in_full

    with ledger_of(context) as (_, ledger):
        document = get(ledger.database, document_id, tenant=tenant)
        out.print_json(data=document_in_full(document, ledger.database))


@app.command()
def remove(
    context: typer.Context,
    document_ids: Annotated[list[str], typer.Argument(help="doc_…, as `list` shows it")],
    tenant: Tenant = "default",
) -> None:
    """Delete documents; no search finds them any more."""
    from memory import documents

    with ledger_of(context) as (settings, ledger):
        for document_id in document_ids:
            gone = documents.remove(ledger.database, document_id, tenant=tenant)
            out.print(f"removed  {gone.id}  {gone.source}", markup=False, highlight=False, soft_wrap=True)
        follow(settings)


@app.command()
def search(
    context: typer.Context,
    text: str,
    workload: Annotated[str | None, typer.Option(help="as a run of this workload would")] = None,
    tenant: Tenant = "default",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 5,
) -> None:
    """The passages that say most about a text, each with its source and its place there."""
    from memory.embed import load_embedder
    from memory.library import Documents
    from memory.search import by_scan

    with ledger_of(context) as (settings, ledger):
        nearest = by_scan(ledger, load_embedder(settings.embedder, settings.data_dir / "embedder"))
        library = Documents(ledger.database, nearest, settings.knowledge)
        found = library.search(text, tenant=tenant, workload=workload, limit=limit)
    table = Table("similarity", "source", "place", "text")
    for passage in found:
        figure = "-" if passage.similarity is None else f"{passage.similarity:.2f}"
        table.add_row(figure, *(escape(t) for t in (passage.document.source, passage.chunk.place, passage.excerpt)))
    out.print(table)


def _files(paths: list[Path]) -> Iterator[tuple[Path, str | None]]:
    """Every file, a folder's in the order of their names, with the reason why there is nothing to read."""
    from memory.reading import FORMS

    for path in paths:
        if not path.is_dir():
            yield path, None if path.is_file() else "there is no such file"
            continue
        inside = (p for p in path.rglob("*") if p.is_file() and not p.is_symlink() and p.suffix.lower() in FORMS)
        shown = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
        if not shown:
            yield path, f"the folder holds no document ({', '.join(sorted(FORMS))})"
        yield from ((p, None) for p in shown)


def _bytes(path: Path, config: KnowledgeConfig) -> bytes:
    with boundary(ConfigError, "it cannot be read"):
        if path.stat().st_size > config.max_file_mb * 1024 * 1024:
            raise ConfigError(f"it is larger than {config.max_file_mb} MB")
        return path.read_bytes()


def _source(path: Path) -> str:
    """A file's name to the ledger: the same from wherever the command is called."""
    return os.fsencode(path.resolve()).decode("utf-8", "replace")
