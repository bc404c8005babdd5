from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.report import Measured, Report, build_report, overall, write_report
from memory.errors import ConfigError
from tests.evals.made import evaluation, first


def measured(name: str, successes: int, chat: int, memory: bool = False) -> Measured:
    held = evaluation(first(successes, 48), memory=memory)
    return Measured(name, [held], [evaluation(first(chat, 24), suite="chat", role="control", workloads=("chat",))])


def report(before: str | None = None, after: str | None = None) -> Report:
    return build_report(
        [measured("base", 14, 20), measured("gen-1", 38, 19), measured("gen-2+memory", 46, 20, memory=True)],
        decision="promote",
        reasons=["Held-out success rose."],
        corrections=60,
        seconds={"train": 61.234},
        engine="vLLM 0.32.0",
        model="SmolLM2-135M-Instruct",
        before=before,
        after=after,
    )


def test_the_report_has_the_shape_of_the_issue(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "demo" / "report.json")
    stored = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    expected = ["rows", "gain", "decision", "reasons", "corrections", "seconds", "engine", "model"]
    assert list(stored) == expected
    assert [row["name"] for row in stored["rows"]] == ["base", "gen-1", "gen-2+memory"]
    for row in stored["rows"]:
        assert set(row) == {"name", "workloads", "controls"}
        assert set(row["workloads"]) == {"sums", "gcd"}
        assert set(row["controls"]) == {"chat"}
        for rate in [*row["workloads"].values(), *row["controls"].values()]:
            assert set(rate) == {"n", "success", "low", "high"}
            assert 0 <= rate["low"] <= rate["success"] <= rate["high"] <= 1
    assert set(stored["gain"]) == {"points", "low", "high"}
    assert stored["seconds"] == {"train": 61.2}


def test_the_gain_is_from_the_first_row_to_the_last_in_points() -> None:
    gain = report()["gain"]
    assert gain is not None
    assert gain["points"] == pytest.approx(100 * 32 / 48)
    assert 40 < gain["low"] < gain["points"] < gain["high"] < 100


def test_the_gain_may_be_asked_for_between_other_rows() -> None:
    gain = report(before="gen-1", after="gen-2+memory")["gain"]
    assert gain is not None
    assert gain["points"] == pytest.approx(100 * 8 / 48)
    with pytest.raises(ConfigError, match="no row 'gen-9'"):
        report(after="gen-9")


def test_one_row_has_no_gain() -> None:
    alone = build_report(
        [measured("base", 1, 1)], decision="skipped", reasons=[], corrections=0, seconds={}, engine="", model=""
    )
    assert alone["gain"] is None


def test_rows_of_other_tasks_have_no_gain_to_speak_of() -> None:
    other = Measured("gen-1", [evaluation(first(3, 48), suite="other")])
    with pytest.raises(ConfigError, match="not of the same held-out suites"):
        build_report(
            [measured("base", 1, 1), other], decision="", reasons=[], corrections=0, seconds={}, engine="", model=""
        )


def test_the_overall_rate_is_over_tasks_not_over_workloads() -> None:
    found = overall(report()["rows"][0]["workloads"])
    assert (found["n"], found["success"]) == (48, pytest.approx(14 / 48))
