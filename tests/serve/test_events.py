"""A night's events: appended, numbered, readable while the last line is being written."""

from __future__ import annotations

from pathlib import Path

from serve.api.night_views import WITHHELD, event_for
from serve.events import EVENTS_FILE, emitter, read_events


def test_events_come_back_in_order_with_their_numbers(tmp_path: Path) -> None:
    emit = emitter(tmp_path / "night")
    emit("train", "step", step=1, loss=0.5)
    emit("train", "error", message="the trainer's own word", stage="sft")
    assert [(e["seq"], e["message"]) for e in read_events(tmp_path / "night")] == [(0, "step"), (1, "error")]
    (last,) = read_events(tmp_path / "night", after=1)
    assert last["data"] == {"message": "the trainer's own word", "stage": "sft"}


def test_the_gates_word_is_withheld_until_its_record_tells_whose_workloads_it_names() -> None:
    said = ["Held-out workload 'rival-secret' lost 2 of 8.", "Held-out workload 'mine' won 3 of 8."]
    event = {"stage": "decide", "message": "reject", "data": {"reasons": said}}
    assert event_for(event, "t", None, {"mine"})["data"]["reasons"] == [WITHHELD]
    decision = {"table": [{"workload": "rival-secret"}, {"workload": "mine"}]}
    assert event_for(event, "t", decision, {"mine"})["data"]["reasons"] == [said[1], WITHHELD]


def test_words_of_users_with_line_ends_of_their_own_break_no_event(tmp_path: Path) -> None:
    emitter(tmp_path)("practice", "tried", workload="pasted\u2028from a page\x85")
    assert [e["data"]["workload"] for e in read_events(tmp_path)] == ["pasted\u2028from a page\x85"]


def test_a_half_written_line_waits(tmp_path: Path) -> None:
    emitter(tmp_path)("dataset", "done")
    with (tmp_path / EVENTS_FILE).open("a") as file:
        file.write('{"at": "2026-')
    assert len(read_events(tmp_path)) == 1
    assert read_events(tmp_path / "no-such-night") == []
