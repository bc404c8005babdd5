"""`nightschool lineage | diff | report`: what a reply came from and taught, what changed between two generations, and
what a night did and why.

All read the ledger straight, whether or not a service runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from memory.errors import NotFoundError

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
    """Where a reply came from (generation, night, examples, runs, feedback), and what it taught.

    Every reply has its id: `nightschool lineage chatcmpl-traj_0192f…`
    """
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
    everything: Annotated[bool, typer.Option("--all", help="also the tasks that both did equally well")] = False,
    full: Annotated[bool, typer.Option("--full", help="questions and answers in full, not their ends")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the same as the API's reply")] = False,
) -> None:
    """Two generations on the same tasks: how many went better or worse, and which, answers side by side.

    What the newest one changed on one suite: `nightschool diff 3 4 --suite chat`; every answer of both on it, in full:
    `nightschool diff 3 4 --suite chat --all --full`
    """
    from serve.diff import compare, print_diff

    with _ledger(context) as ledger:
        found = compare(ledger, before, after, tenant=tenant, suite=suite, unchanged=everything)
    if as_json:
        out.print_json(found.model_dump_json())
    else:
        print_diff(found, out, full=full)


@app.command()
def report(
    context: typer.Context,
    night: Annotated[str | None, typer.Argument(help="night_…; default: the newest")] = None,
    show: Annotated[bool, typer.Option("--open", help="open the page in the browser")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the whole report as JSON")] = False,
) -> None:
    """What a night did and why, in plain words; its page has samples, losses, the curve and the gate's table.

    The newest one in the browser: `nightschool report --open`
    """
    from evals.night_page import render_night
    from evals.page import write_page
    from serve.reports import night_report
    from serve.settings import load_settings

    settings = load_settings(**context.obj)
    with _ledger(context) as ledger:
        nights = ledger.nights()
        if night is None and not nights:
            raise NotFoundError("there was no night yet; `nightschool night` begins one")
        told = night_report(ledger, nights[-1] if night is None else ledger.night(night), settings.model)
    if as_json:
        out.print_json(told.model_dump_json())
        return
    # A night that is going on writes its own when it is over.
    page = settings.night_dir(told.night) / ("report.html" if told.ended else "report-so-far.html")
    write_page(render_night(told), page)
    out.print(f"[bold]{told.night}: {told.status}[/bold]", highlight=False)
    for sentence in [*told.story, *(f"- {reason}" for reason in told.reasons)]:
        out.print(sentence, highlight=False, markup=False)
    out.print(f"page: {page}", highlight=False, soft_wrap=True)
    if show:
        import webbrowser

        webbrowser.open(page.as_uri())


@contextmanager
def _ledger(context: typer.Context) -> Iterator[Ledger]:
    from serve.settings import load_settings
    from serve.wiring import open_ledger

    ledger = open_ledger(load_settings(**context.obj))
    try:
        yield ledger
    finally:
        ledger.close()
