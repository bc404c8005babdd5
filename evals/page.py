"""The report of a demo or night as one self-contained HTML page.

Owns the page's words and looks. Everything that came from a model, a user or a setting is escaped;
the page loads nothing and runs nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from evals.gate import GateDecision, GateRow
from evals.report import Rate, Report, Row, overall
from memory.errors import ConfigError, boundary
from memory.records import LOOKED_UP, RECALLED, Message, Task, Trajectory, text_of

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6672; --line: #dde2e7; --paper: #fff; --tint: #f4f6f8;
  --good: #11734b; --bad: #ab1f3d; --wait: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa6b2; --line: #343d47; --paper: #14181d;
  --tint: #1c2229; --good: #5fd0a0; --bad: #ff8aa1; --wait: #e5b760; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
.headline { font-size: 1.15rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .wait { color: var(--wait); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } thead th { color: var(--soft); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr.all td, tr.all th { font-weight: 600; background: var(--tint); }
.between { color: var(--soft); font-weight: 400; font-size: .85em; margin-left: .35em; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
ul { padding-left: 1.2rem; max-width: 46rem; } li { margin: .25rem 0; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .5rem .8rem; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 .6rem;
  font: .88rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
.who { color: var(--soft); font-size: .8rem; }
"""

_VERDICTS = {
    "promote": ("good", "Promoted"),
    "reject": ("bad", "Rejected"),
    "not_enough_evidence": ("wait", "Not enough evidence"),
}
_STATES = {
    "better": ("good", "better"),
    "held": ("good", "held"),
    "worse": ("bad", "worse"),
    "lost": ("bad", "lost"),
    "same": ("wait", "no gain"),
    "unproven": ("wait", "unproven"),
    "unclear": ("wait", "unclear"),
    "blind": ("soft", "cannot show a loss"),
    "part": ("soft", ""),
}


def render_page(
    report: Report,
    *,
    title: str = "Nightschool: the learning curve",
    intro: Sequence[str] = (),
    curve: Path | None = None,
    decisions: Sequence[tuple[str, GateDecision]] = (),
    samples: Sequence[tuple[Task, Trajectory]] = (),
) -> str:
    """The page as text. `intro`: paragraphs under the title; `decisions`: (night, its gate); `curve`: a PNG.

    Raises: ConfigError when the PNG cannot be read.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(report["model"])}, served by {escape(report["engine"])}</p>',
        _headline(report),
        *(f"<p>{escape(text)}</p>" for text in intro),
        _figure(curve) if curve is not None else "",
        rates_section("Held-out success", "workloads", report["rows"]),
        rates_section("Controls: what it could do before", "controls", report["rows"]),
        *(gate_section(name, decision) for name, decision in decisions),
        _times(report),
        _samples(samples),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{_join(parts)}</body></html>\n'


def write_page(page: str, path: Path) -> None:
    """Write the page, whole or not at all."""
    with boundary(ConfigError, f"cannot write the page {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)


def _join(parts: Sequence[str]) -> str:
    return "\n".join(part for part in parts if part)


def _headline(report: Report) -> str:
    colour, word = _VERDICTS.get(report["decision"], ("soft", report["decision"]))
    gain = report["gain"]
    told = f'<span class="{colour}">{escape(word)}.</span> '
    if gain is not None:
        told += (
            f"Gain on held-out tasks: <strong>{gain['points']:+.1f} points</strong> "
            f"(95% interval {gain['low']:+.1f} to {gain['high']:+.1f}), from {report['corrections']} corrections."
        )
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report["reasons"])
    return f'<p class="headline">{told}</p>' + (f"<ul>{reasons}</ul>" if reasons else "")


def _figure(curve: Path) -> str:
    with boundary(ConfigError, f"cannot read the plot {curve}"):
        data = base64.b64encode(curve.read_bytes()).decode()
    alt = "Held-out success by generation, overall, by workload, and on control suites"
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}.</figcaption></figure>'


def rates_section(title: str, kind: str, rows: Sequence[Row]) -> str:
    cells: list[dict[str, Rate]] = [row["workloads"] if kind == "workloads" else row["controls"] for row in rows]
    names = list(dict.fromkeys(name for found in cells for name in found))
    if not names:
        return ""
    head = "".join(f"<th>{escape(row['name'])}</th>" for row in rows)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_rate(found.get(name)) for found in cells)}</tr>" for name in names
    )
    if kind == "workloads":
        body += f'<tr class="all"><th>all</th>{"".join(_rate(overall(found)) for found in cells)}</tr>'
    caption = "Share of tasks with full marks; Wilson 95% interval and number of tasks beside it."
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><caption>{caption}</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _rate(rate: Rate | None) -> str:
    if rate is None or rate["success"] is None:
        return "<td>not run</td>"
    between = f"{100 * rate['low']:.0f} to {100 * rate['high']:.0f}, n = {rate['n']}"
    return f'<td>{100 * rate["success"]:.0f}%<span class="between">{between}</span></td>'


def gate_section(name: str, decision: GateDecision) -> str:
    colour, word = _VERDICTS[decision.verdict]
    head = '<th class="text">part</th><th>tasks</th><th>champion</th><th>candidate</th><th>points</th>'
    head += '<th>between</th><th>exact p</th><th>may lose</th><th class="text">judged</th>'
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in decision.reasons)
    return (
        f'<h2>Gate, {escape(name)}: <span class="{colour}">{word}</span></h2><ul>{reasons}</ul>'
        f'<div class="scroll"><table><caption>Paired, task by task; both bounds one-sided 95%.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(_gate_row, decision.table))}</tbody></table></div>"
        f"{_lengths(decision)}"
    )


def _lengths(decision: GateDecision) -> str:
    if not decision.lengths:
        return ""
    told = "; ".join(f"{row.suite} {row.champion:.0f} to {row.candidate:.0f}" for row in decision.lengths)
    return f'<p class="soft">Median answer in characters: {escape(told)}.</p>'


def _gate_row(row: GateRow) -> str:
    colour, word = _STATES[row.state]
    whole = row.role == "held_out" and row.workload is None
    name = "all held-out tasks" if whole else row.workload or f"control: {row.suite}"
    whole_mark = ' class="all"' if whole else ""
    margin = "" if row.margin is None else f"{row.margin:.0f}"
    return (
        f'<tr{whole_mark}><th class="text">{escape(name)}</th><td>{row.n}</td><td>{row.champion}</td>'
        f"<td>{row.candidate}</td><td>{row.points:+.1f}</td>"
        f"<td>{row.low:+.1f} to {row.high:+.1f}</td><td>{row.p_value:.3f}</td><td>{margin}</td>"
        f'<td class="text {colour}">{word}</td></tr>'
    )


def _times(report: Report) -> str:
    if not report["seconds"]:
        return ""
    rows = "".join(f"<tr><th>{escape(s)}</th><td>{duration(t)}</td></tr>" for s, t in report["seconds"].items())
    total = duration(sum(report["seconds"].values()))
    return (
        f'<h2>Time</h2><div class="scroll"><table><tbody>{rows}'
        f'<tr class="all"><th>all</th><td>{total}</td></tr></tbody></table></div>'
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _samples(samples: Sequence[tuple[Task, Trajectory]]) -> str:
    if not samples:
        return ""
    return f"<h2>Sample runs</h2>{''.join(_sample(task, trajectory) for task, trajectory in samples)}"


def _sample(task: Task, trajectory: Trajectory) -> str:
    colour, mark = ("good", "right") if trajectory.success else ("bad", "wrong")
    told = "".join(message_block(m) for m in trajectory.messages if m.get("role") != "system")
    expected = (
        f'<div class="who">reference (never shown to the model)</div><pre>{escape(task.reference or "none")}</pre>'
    )
    return (
        f'<details><summary><span class="{colour}">{mark}</span> {escape(trajectory.model)}, {escape(task.workload)}: '
        f"{escape(task.question[:120])}</summary>{told}{expected}</details>"
    )


def message_block(message: Message) -> str:
    who = str(message.get("role", "")) + (", from memory" if message.get("name") in (RECALLED, LOOKED_UP) else "")
    calls = [f"{c['function']['name']} {c['function']['arguments']}" for c in message.get("tool_calls") or []]
    said = text_of(message) or "\n".join(calls) or json.dumps(message.get("content"))
    return f'<div class="who">{escape(who)}</div><pre>{escape(said)}</pre>'
