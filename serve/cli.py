"""The command line: `nightschool COMMAND`. Parses, connects, prints; the work is done elsewhere.

An expected error is one line on stderr and exit code 2; Ctrl-C is exit code 130. Nothing heavy is
imported before a command needs it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from memory.errors import ConfigError, NightschoolError
from serve.cli_batch import app as batch_app
from serve.cli_keys import app as keys_app
from serve.cli_knowledge import app as knowledge_app
from serve.cli_memory import app as memory_app
from serve.cli_nights import app as nights_app

app = typer.Typer(
    name="nightschool",
    help="An agent endpoint that remembers, learns overnight and serves a better model in the morning.\n\n"
    "Start with `nightschool demo`, or `nightschool serve` and any OpenAI client on http://127.0.0.1:8000/v1.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys_app, name="keys")
app.add_typer(memory_app, name="memory")
app.add_typer(knowledge_app, name="knowledge")
app.add_typer(batch_app, name="batch")
app.add_typer(nights_app)
out = Console()
err = Console(stderr=True)


@app.callback()
def _options(
    context: typer.Context,
    data_dir: Annotated[Path | None, typer.Option(help="where everything is kept (default: ./data)")] = None,
) -> None:
    context.obj = {"data_dir": data_dir}


def _settings(context: typer.Context, **overrides: Any) -> Any:
    from serve.settings import load_settings

    return load_settings(**context.obj, **overrides)


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="address to listen on; 0.0.0.0 for all")] = None,
    port: Annotated[int | None, typer.Option(help="0 picks a free one")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="no API keys; on a loopback address only")] = False,
    background: Annotated[bool, typer.Option("--background", hidden=True)] = False,
) -> None:
    """Serve the OpenAI-compatible endpoint; starts and supervises the engine. The first start prints an admin key."""
    from serve.server import serve_forever

    settings = _settings(context)
    given = {"host": host, "port": port, "keys": False if insecure else None}
    changed = {name: value for name, value in given.items() if value is not None}
    settings = settings.model_copy(update={"server": settings.server.model_copy(update=changed)})
    serve_forever(settings, background=background)


@app.command()
def run(
    context: typer.Context,
    tasks: Annotated[Path, typer.Argument(help="JSONL: messages or prompt; id, workload, tools, reference, verifier")],
    output: Annotated[Path | None, typer.Option(help="results file (default: TASKS.results.jsonl)")] = None,
    model: Annotated[str, typer.Option(help="nightschool, nightschool:gen-N, champion or gen-N")] = "nightschool",
    concurrency: Annotated[int, typer.Option(min=1, max=256)] = 32,
) -> None:
    """Run a file of tasks through the agent; goes on where it was when called again."""
    from serve.client import connect
    from serve.commands import run_file

    settings = _settings(context)
    broken = run_file(
        lambda: connect(settings, _say), tasks, output or tasks.with_suffix(".results.jsonl"), model, concurrency, out
    )
    if broken:
        raise ConfigError(f"{len(broken)} broken line(s) in {tasks} were not run: {broken[0]}")


@app.command()
def feedback(
    context: typer.Context,
    response: Annotated[str, typer.Argument(help="response id (chatcmpl-…) or trajectory id (traj_…)")],
    score: Annotated[float | None, typer.Option(min=0, max=1, help="how good it was, 0..1")] = None,
    correction: Annotated[str | None, typer.Option(help="the right answer, or @FILE with OpenAI messages")] = None,
    hint: Annotated[str | None, typer.Option(help="a sentence that would have helped")] = None,
    comment: Annotated[str | None, typer.Option(help="kept, never trained on")] = None,
    over: Annotated[str | None, typer.Option(help="id of a worse response")] = None,
    tenant: Annotated[str, typer.Option(help="whose reply it is")] = "default",
) -> None:
    """Score, correct or comment on a reply; the next night learns from what it can trust."""
    from serve.api.auth import OPERATOR
    from serve.api.feedback import FeedbackRequest, store_feedback
    from serve.commands import feedback_value
    from serve.wiring import open_ledger

    kind, value = feedback_value(score=score, correction=correction, hint=hint, comment=comment, preference=over)
    ledger = open_ledger(_settings(context))
    try:
        said = FeedbackRequest(
            **{"response_id" if response.startswith(("chatcmpl-", "resp_")) else "trajectory_id": response},
            kind=kind,
            value=value,
        )
        stored = store_feedback(ledger, said, tenant=tenant, author=OPERATOR)
    finally:
        ledger.close()
    out.print(f"{stored.id}  {stored.kind}  {stored.trust} ({stored.trust_reason})")


@app.command()
def trust(
    context: typer.Context,
    feedback_id: Annotated[str, typer.Argument(metavar="FEEDBACK", help="fb_…, as `nightschool feedback` printed it")],
    why: Annotated[str, typer.Option(help="the reason, kept beside it")],
    reject: Annotated[bool, typer.Option("--reject", help="it must not teach (any more)")] = False,
    tenant: Annotated[str, typer.Option(help="whose it is")] = "default",
) -> None:
    """Let a word teach that nothing else supports yet, or with --reject keep it from teaching."""
    from memory import approvals
    from memory.records import Trust
    from serve.api.auth import OPERATOR
    from serve.wiring import open_ledger

    ledger = open_ledger(_settings(context))
    try:
        chosen = Trust.REJECTED if reject else Trust.TRUSTED
        said = approvals.decide(ledger.database, feedback_id, chosen, why, tenant=tenant, by=OPERATOR)
    finally:
        ledger.close()
    out.print(f"{said.id}  {said.kind}  {said.trust} ({said.trust_reason})")


@app.command()
def night(
    context: typer.Context,
    recipes: Annotated[str | None, typer.Option(help="comma-separated, instead of the settings'")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="only go on with an unfinished night")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would learn and cost; write nothing")] = False,
    since: Annotated[
        str | None, typer.Option(help="learn only from what came after: 24h, 7d, 2026-11-20, gen-3 or night_…")
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="stop the running night; what serves stays")] = False,
) -> None:
    """Distil, train, evaluate, then promote or reject. An unfinished night goes on first.

    Look before you learn from the last day: `nightschool night --since 24h --dry-run`, then the same without it.
    """
    from serve.client import connect
    from serve.commands import follow_night, print_night, print_resumed
    from serve.dry_run import Estimate, print_estimate

    names = [name for part in recipes.split(",") if (name := part.strip())] if recipes else None
    body = {"recipes": names, "since": since}
    body = {name: value for name, value in body.items() if value is not None}
    with connect(_settings(context), _say) as client:
        if dry_run:
            print_estimate(Estimate.model_validate(client.post("/v1/fine_tuning/jobs/estimate", body)), out)
            return
        jobs = client.get("/v1/fine_tuning/jobs")["data"]
        unfinished = [job for job in jobs if job["status"] == "running"]
        if resume and not unfinished:
            raise ConfigError("there is no unfinished night to resume")
        if cancel and not unfinished:
            raise ConfigError("there is no unfinished night to cancel")
        if cancel:
            client.post(f"/v1/fine_tuning/jobs/{unfinished[0]['id']}/cancel", {})
        elif unfinished:
            print_resumed(unfinished[0], body, out)
        job = unfinished[0] if unfinished else client.post("/v1/fine_tuning/jobs", body)
        ended = follow_night(client, job["id"], out)
        print_night(ended, out)
        if ended["nightschool"]["status"] == "failed":
            raise ConfigError(ended["error"]["message"])


@app.command()
def generations(context: typer.Context) -> None:
    """List what was trained, what serves, and why."""
    from serve.commands import print_generations
    from serve.wiring import open_ledger

    ledger = open_ledger(_settings(context))
    try:
        print_generations(ledger, out)
    finally:
        ledger.close()


@app.command()
def promote(
    context: typer.Context,
    number: int,
    why: Annotated[str, typer.Option()] = "by hand",
    canary: Annotated[
        float | None, typer.Option(help="only to this share of the users (0.1), until live outcomes decide")
    ] = None,
) -> None:
    """Serve generation NUMBER from now on, to all users or, with --canary, to a share of them first.

    A user in the share stays in it. Live outcomes decide: proven worse, the generation goes back by itself;
    after watch.canary_outcomes judged runs without that, it serves all. `nightschool rollback` ends it by hand.
    """
    if canary is not None and not 0 < canary < 1:
        raise ConfigError(f"--canary is a share between 0 and 1, got {canary:g}")
    _switch(context, f"/v1/generations/{number}/promote", why, **({"canary": canary} if canary else {}))


@app.command()
def rollback(context: typer.Context, why: Annotated[str, typer.Option()] = "by hand") -> None:
    """Undo the last switch: end the canary, or serve the generation before the champion again."""
    _switch(context, "/v1/generations/rollback", why)


def _switch(context: typer.Context, path: str, why: str, **more: Any) -> None:
    from serve.client import connect

    with connect(_settings(context), _say) as client:
        done = client.post(path, {"why": why, **more})
    if "canary" in more:
        out.print(f"generation {done['number']} serves {more['canary']:.0%} of the users now")
    else:
        out.print(f"generation {done['to_generation']} serves now (before: {done['from_generation']})")


@app.command()
def status(context: typer.Context) -> None:
    """What runs, what serves, what was learned."""
    from serve.commands import print_status
    from serve.wiring import open_ledger

    settings = _settings(context)
    ledger = open_ledger(settings)
    try:
        print_status(settings, ledger, out)
    finally:
        ledger.close()


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="nightschool or nightschool:gen-N")] = "nightschool",
    suite: Annotated[list[str] | None, typer.Option(help="suite name, may be repeated; default: all")] = None,
    memory: Annotated[bool, typer.Option(help="with recall, as served")] = True,
) -> None:
    """Run the frozen suites on a generation and print success with 95% intervals."""
    from serve.client import connect
    from serve.commands import print_evaluations

    with connect(_settings(context), _say) as client, out.status("running the suites"):
        done = client.post("/v1/evaluations", {"model": model, "suites": suite or None, "memory": memory})
    print_evaluations(done["data"], out)


@app.command()
def models(context: typer.Context) -> None:
    """The model names that a client may ask for."""
    from serve.promotion import ensure_base, model_names
    from serve.wiring import open_ledger

    settings = _settings(context)
    ledger = open_ledger(settings)
    try:
        ensure_base(ledger, settings.model)
        out.print("\n".join(model_names(ledger)))
    finally:
        ledger.close()


@app.command()
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="which one; without a name they are listed")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    data: Annotated[Path | None, typer.Option(help="a folder of real tasks, for the benches that read one")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="ablation, forgetting: this arm beside the default night; repeatable")
    ] = None,
) -> None:
    """Measure this machine: a table, with the aims beside the figures."""
    from evals.bench import print_result, run_bench, write_json
    from serve.benches import benches

    known = benches(_settings(context), data, arm or [])
    if name is None:
        for each in known.values():
            out.print(f"{each.name:12} {each.summary}")
        return
    done = run_bench(name, known)
    print_result(done, out)
    if json_file is not None:
        write_json(done, json_file)


@app.command()
def settings(context: typer.Context) -> None:
    """Print the settings in force as JSON."""
    out.print_json(_settings(context).model_dump_json())


@app.command()
def demo(
    context: typer.Context,
    full: Annotated[bool, typer.Option("--full", help="60 held-out tasks a workload, with and without memory")] = False,
) -> None:
    """Live through two nights: days, corrections, training, the gate, and the learning curve."""
    from serve.client import connect
    from serve.demo import run_demo

    settings = _settings(context)
    # Its few runs show what memory does; they are too few to measure what an item is worth.
    shown = {"NIGHTSCHOOL_RECALL__WITHHOLD_SHARE": "0"}
    run_demo(settings, lambda: connect(settings, _say, shown), out, full=full)


def _say(text: str) -> None:
    """A line about what is waited for."""
    err.print(f"[dim]{text}[/dim]")


def main() -> None:
    """The entry point of the `nightschool` script."""
    try:
        app(standalone_mode=False)
    except NightschoolError as exc:
        err.print(f"nightschool: {exc}", style="red", markup=False, highlight=False)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted; nothing acknowledged is lost, the same command goes on")
        sys.exit(130)
    except typer.Exit as exc:
        sys.exit(exc.exit_code)
    except Exception as exc:
        if type(exc).__module__.startswith(("click", "typer")) and hasattr(exc, "format_message"):
            err.print(f"nightschool: {exc.format_message()}", style="red", markup=False)  # type: ignore[attr-defined]
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
