"""The morning report as one self-contained HTML page: it loads nothing, runs nothing, and escapes all it was told."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from evals.night_report import Learned, NightReport, Point, Practice, Recipe, Sample, TeacherHelp, Training
from evals.page import STYLE, duration, gate_section, message_block, rates_section
from evals.report import overall
from evals.svg import Line, plot
from memory.escalations import HelpFigures

NIGHT_STYLE = (
    STYLE
    + """svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); } svg.key { width: .7em; height: .7em; margin: 0 .35em 0 .9em; }
"""
)
"""Its text is all that a Content-Security-Policy needs to allow."""

_TELLS = {"promoted": "good", "rejected": "bad", "failed": "bad", "skipped": "wait", "cancelled": "wait"}


def render_night(report: NightReport) -> str:
    """The page as text."""
    began = f"{report.began:%Y-%m-%d %H:%M} UTC"
    parts = [
        "<h1>Nightschool: the morning report</h1>",
        f'<p class="soft">{escape(report.night)}, begun {began}, {escape(report.model)}</p>',
        _story(report),
        gate_section(report.night, report.gate) if report.gate else "",
        _learned(report.learned, report.dropped),
        _practice(report.practice) if report.practice else "",
        _teacher(report.teacher) if report.teacher else "",
        _recipes(report.recipes),
        _training(report.training) if report.training else "",
        _curve(report.curve),
        rates_section("Held-out success, all generations", "workloads", [p.row for p in report.curve]),
        rates_section("Controls: what it could do before", "controls", [p.row for p in report.curve]),
        _cost(report),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(report.night)}</title><style>{NIGHT_STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _story(report: NightReport) -> str:
    colour = _TELLS.get(report.status, "soft")
    first, *others = report.story
    told = f'<p class="headline"><strong class="{colour}">{escape(first)}</strong></p>'
    told += "".join(f"<p>{escape(sentence)}</p>" for sentence in others)
    # The gate's section lists its own reasons under its table's title.
    others = [reason for reason in report.reasons if report.gate is None or reason not in report.gate.reasons]
    if others:
        told += f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in others)}</ul>"
    return told


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str | int]], caption: str = "") -> str:
    if not rows:
        return ""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    table = f"<table>{said}<thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table>"
    return f'{heading}<div class="scroll">{table}</div>'


def _learned(learned: Learned, dropped: dict[str, int]) -> str:
    since = f" since {learned.since:%Y-%m-%d %H:%M} UTC" if learned.since else ""
    judged = ", ".join(f"{count} {escape(trust)}" for trust, count in learned.feedback.items()) or "none new"
    told = f"<h2>What it learned from</h2><p>{learned.runs} new runs{since}; feedback judged: {judged}.</p>"
    voices = [(voice.who, voice.examples, voice.corrections) for voice in learned.voices]
    told += _table("", ("from", "examples", "corrections"), voices)
    if learned.elsewhere:
        told += f'<p class="soft">{learned.elsewhere} more examples belong to other tenants.</p>'
    return told + _table("", ("left out because", "examples"), list(dropped.items()))


def _practice(practice: Practice) -> str:
    hinted = f", {practice.hinted} of them for a user's hint" if practice.hinted else ""
    hinted += f", {practice.complained} of them for a user's complaint" if practice.complained else ""
    told = (
        f"<h2>Practice</h2><p>{practice.tasks} earlier tasks tried again{hinted}: {practice.successes} of "
        f"{practice.tries} tries succeeded, in {practice.tokens} tokens. {practice.examples} examples came from it.</p>"
    )
    if practice.left_out:
        told += f'<p class="wait">The night had no time for {practice.left_out} more tries.</p>'
    head = ("workload", "share", "because", "success before", "tasks", "tries", "succeeded", "tokens", "examples")
    rows = [
        (w.workload, f"{w.share:.0%}", w.why, f"{w.before:.0%}", w.tasks, w.tries, w.successes, w.tokens, w.examples)
        for w in practice.workloads
    ]
    return told + _table("", head, rows)


def _teacher(teacher: TeacherHelp) -> str:
    head = ("of", "requests", "escalated", "rate", "predicted", "right", "in vain", "tokens", "dollars")
    rows = [_help("all, since the night before", teacher.day)]
    rows += [_help(f"gen-{helped.generation}", helped) for helped in teacher.generations]
    return _table("The teacher's help", head, rows, "A generation's row is of all days up to this night.")


def _help(name: str, helped: HelpFigures) -> tuple[str | int, ...]:
    rate = "" if helped.rate is None else f"{helped.rate:.1%}"
    cost = "" if helped.cost_usd is None else f"{helped.cost_usd:.4f}"
    counts = (helped.predicted, helped.succeeded, helped.unanswered, helped.tokens)
    return name, helped.requests, helped.escalated, rate, *counts, cost


def _recipes(recipes: Sequence[Recipe]) -> str:
    rows = [(r.name, r.examples, r.with_memory) for r in recipes]
    told = _table("Examples by recipe", ("recipe", "examples", "of them with memory in the prompt"), rows)
    return told + "".join(_sample(recipe.name, sample) for recipe in recipes for sample in recipe.samples)


def _sample(recipe: str, sample: Sample) -> str:
    memory = ", with memory" if sample.with_memory else ""
    told = "".join(message_block(message) for message in sample.messages)
    for name, side in (("chosen", sample.chosen), ("rejected", sample.rejected)):
        if side is not None:
            told += f'<p class="soft">{name}</p>' + "".join(message_block(message) for message in side)
    title = f"{escape(recipe)}: {escape(sample.workload)} ({escape(sample.kind)}{memory})"
    return f"<details><summary>{title}</summary>{told}</details>"


def _training(training: Training) -> str:
    told = (
        f"<h2>Training: generation {training.generation}</h2><p>{training.rows} rows and {training.pairs} pairs, "
        f"{training.tokens} tokens ({training.trained_tokens} with loss), {duration(training.seconds)}, "
        f"{training.tokens_per_s:.0f} tokens a second.</p>"
    )
    if training.alpha is not None:
        told += (
            f"<p>Validation chose {training.alpha:.0%} of the way from the previous generation's weights to these.</p>"
        )
    if training.note:
        told += f'<p class="wait">{escape(training.note)}</p>'
    steps = [loss for part in training.losses.values() for loss in part]
    if not steps:
        return told
    lines, before = [], 0
    for phase, losses in training.losses.items():
        gap = [None] * before
        lines.append(Line(f"{phase} loss", [*gap, *losses]))
        before += len(losses)
    places = [str(step) for step in range(1, before + 1)]
    return told + plot(lines, places, top=max(steps) or 1.0, title="Loss by step")


def _curve(curve: Sequence[Point]) -> str:
    if not curve:
        return ""
    whole = [overall(point.row["workloads"]) for point in curve]
    lines = [
        Line(
            "all held-out tasks, 95% interval",
            [None if r["success"] is None else 100 * r["success"] for r in whole],
            [None if r["success"] is None else (100 * r["low"], 100 * r["high"]) for r in whole],
        )
    ]
    for kind in ("workloads", "controls"):
        for name in dict.fromkeys(name for point in curve for name in point.row[kind]):
            rates = [point.row[kind].get(name) for point in curve]
            values = [None if r is None or r["success"] is None else 100 * r["success"] for r in rates]
            lines.append(Line(name, values, dashed=kind == "controls"))
    names = [f"gen-{p.generation}{' (rejected)' if p.status == 'rejected' else ''}" for p in curve]
    others = [str(p.generation) for p in curve if not p.same_tasks]
    told = "<h2>Learning curve</h2>" + plot(lines, names, top=100, unit="%", title="Success by generation")
    if others:
        told += f'<p class="soft">On other tasks than tonight\'s: generation {", ".join(others)}.</p>'
    return told


def _cost(report: NightReport) -> str:
    rows = [(stage, duration(seconds)) for stage, seconds in report.seconds.items()]
    rows.append(("all", duration(sum(report.seconds.values()))))
    prompts = [(f"gen-{p.generation}", f"{p.prompt_tokens:.0f}") for p in report.curve if p.prompt_tokens is not None]
    told = _table("Cost", ("stage", "time"), rows) if report.seconds else ""
    parts = {"training": "training, all its steps", "teacher": "teacher, in the days since the night before"}
    counts = [
        (parts.get(t.part, t.part), *("" if n is None else n for n in (t.prompt, t.completion)), t.total)
        for t in report.tokens
    ]
    told += _table("", ("tokens", "prompt", "completion", "all"), counts)
    return told + _table("", ("generation", "prompt tokens of a held-out task"), prompts)
