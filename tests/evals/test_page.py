from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from evals.gate import decide
from evals.page import render_page, write_page
from evals.plot import learning_curve
from evals.report import build_report
from memory.errors import ConfigError
from memory.records import RECALLED, Message, StopReason, Task, Trajectory
from tests.evals.made import control, first, held_out
from tests.evals.test_report import measured, report

HOSTILE = "<script>alert(1)</script><img src=x onerror=\"alert('2')\"> & 'quoted'"


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def seen(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def sample(text: str) -> tuple[Task, Trajectory]:
    task = Task(messages=[{"role": "user", "content": text}], reference=text, workload=text)
    call = {"id": "c", "type": "function", "function": {"name": "calculator", "arguments": text}}
    messages: list[Message] = [
        {"role": "user", "content": text, "name": RECALLED},
        {"role": "user", "content": text},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": text},
        {"role": "assistant", "content": text},
    ]
    run = Trajectory(task_id=task.id, generation=1, model=text, messages=messages, stop_reason=StopReason.ANSWER)
    return task, run


def test_the_page_holds_the_whole_story_in_one_file(tmp_path: Path) -> None:
    told = report()
    curve = learning_curve(told["rows"], tmp_path / "learning_curve.png")
    chat = control(first(20, 24), first(20, 24))
    gate = decide([held_out(first(12, 36), first(33, 36))], [chat])
    page = render_page(
        told, curve=curve, decisions=[("night 1", gate)], samples=[sample("2 + 2")], intro=["Simulated."]
    )
    write_page(page, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    for text in (
        "+66.7 points",
        "gen-2+memory",
        "Gate, night 1",
        "data:image/png;base64,",
        "from memory",
        "Simulated.",
    ):
        assert text in page
    found = seen(page)
    links = [value for name, value in found.attributes if name in ("src", "href")]
    assert all(value is not None and value.startswith("data:") for value in links)


def test_hostile_text_stays_text() -> None:
    told = build_report(
        [measured(HOSTILE, 3, 3), measured("gen-1", 9, 3)],
        decision=HOSTILE,
        reasons=[HOSTILE],
        corrections=1,
        seconds={HOSTILE: 2.0},
        engine=HOSTILE,
        model=HOSTILE,
    )
    gate = decide([held_out(first(1, 36), first(9, 36))], [control(first(9, 24), first(9, 24), HOSTILE)])
    page = render_page(told, title=HOSTILE, intro=[HOSTILE], decisions=[(HOSTILE, gate)], samples=[sample(HOSTILE)])
    found = seen(page)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "<script" not in page


def test_a_missing_plot_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot read the plot"):
        render_page(report(), curve=Path("/nowhere/curve.png"))


def test_a_report_of_one_unjudged_row_still_makes_a_page() -> None:
    told = build_report(
        [measured("base", 1, 1)], decision="skipped", reasons=[], corrections=0, seconds={}, engine="e", model="m"
    )
    assert "skipped" in render_page(told)
