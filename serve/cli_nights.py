"""`nightschool lineage | diff`: what a reply came from and taught, and what changed between two generations.

Both read the ledger straight, whether or not a service runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from memory.ledger import Ledger

app = typer.Typer()
out = Console()


@app.command()
def lineage(
    context: typer.Context,
    record: Annotated[
        str, typer.Argument(help="response (chatcmpl-…, resp_…), trajectory (traj_…) or feedback (fb_…)")
    ],
    tenant: Annotated[str, typer.Option(help="whose it is")] = "default",
    limit: Annotated[int, typer.Option(min=1, help="examples shown for each generation behind it")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="the same as the API's reply")] = False,
) -> None:
    """Where a reply came from (generation, night, examples, runs, feedback), and what it taught."""
    from serve.lineage import trace, tree_of

    with _ledger(context) as ledger:
        found = trace(ledger, record, tenant=tenant, limit=limit)
    if as_json:
        out.print_json(found.model_dump_json())
    else:
        out.print(tree_of(found), highlight=False)


@app.command()
def diff(
    context: typer.Context,
    before: Annotated[int, typer.Argument(min=0)],
    after: Annotated[int, typer.Argument(min=0)],
    suite: Annotated[str | None, typer.Option(help="only this one; default: all that both were evaluated on")] = None,
    tenant: Annotated[str, typer.Option(help="whose questions and answers are shown")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="the same as the API's reply")] = False,
) -> None:
    """Two generations on the same tasks: how many went better or worse, and which, answers side by side."""
    from serve.diff import compare, print_diff

    with _ledger(context) as ledger:
        found = compare(ledger, before, after, tenant=tenant, suite=suite)
    if as_json:
        out.print_json(found.model_dump_json())
    else:
        print_diff(found, out)


@contextmanager
def _ledger(context: typer.Context) -> Iterator[Ledger]:
    from serve.settings import load_settings
    from serve.wiring import open_ledger

    ledger = open_ledger(load_settings(**context.obj))
    try:
        yield ledger
    finally:
        ledger.close()
