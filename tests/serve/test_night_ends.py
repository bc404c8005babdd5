"""How a night ends that is disturbed about its decision: the ledger says what serves, and nothing stays open."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event
from typing import Any

import httpx
import pytest
from dbos import DBOS

from memory.errors import LedgerError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Night, NightStatus
from serve.night import NightSchool, is_over
from serve.stages import STAGES, publication
from serve.stages.night_run import NightRun, Output
from serve.wiring import Services
from tests.serve.fakes import running, settings_in

BETTER, WORSE = ["better by ten"], ["no better"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Services]]:
    """A service whose nights reach their decision at once: the gate promotes."""
    settings = settings_in(tmp_path_factory.mktemp("nights"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("credit", "principles", "dataset", "evaluate"):
            patch.setitem(STAGES, name, lambda _: {})
        patch.setitem(STAGES, "snapshot", lambda run: {"champion": run.services.ledger.champion().number})
        patch.setitem(STAGES, "train", trained)
        patch.setitem(STAGES, "decide", decided)
        patch.setitem(STAGES, "report", lambda run: {"path": str(run.folder)})
        with (
            running(settings, lambda _: "Action: finish(0)") as (url, services),
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            yield http, services


def trained(run: NightRun) -> Output:
    ledger = run.services.ledger
    number, status = ledger.next_generation_number(), GenerationStatus.CANDIDATE
    made = Generation(number=number, base_model="test/model", night_id=run.night.id, status=status)
    ledger.add_generation(made)
    ledger.set_candidate(run.night.id, number)
    return {"generation": number, "trained_tokens": 1}


def decided(_: NightRun) -> Output:
    return {"verdict": "promote", "reasons": BETTER, "table": []}


def cancel(run: NightRun) -> None:
    (run.folder / "cancel").touch()


def broken(run: NightRun) -> Output:
    raise OSError("no space left")


def slept(service: tuple[httpx.Client, Services]) -> Night:
    http, services = service
    id = http.post("/v1/fine_tuning/jobs", json={}).raise_for_status().json()["id"]
    deadline = time.monotonic() + 60
    while (night := services.ledger.night(id)).status is NightStatus.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    serves = services.ledger.champion().number == night.candidate
    assert serves == (night.status is NightStatus.PROMOTED)
    return night


def test_a_night_whose_report_fails_behind_the_switch_is_promoted(
    service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGES, "report", broken)
    night = slept(service)
    assert (night.status, night.reasons) == (NightStatus.PROMOTED, [*BETTER, "OSError: no space left"])


def test_a_night_whose_report_fails_behind_its_rejection_is_rejected(
    service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGES, "decide", lambda _: {"verdict": "reject", "reasons": WORSE, "table": []})
    monkeypatch.setitem(STAGES, "report", broken)
    night = slept(service)
    assert (night.status, night.reasons) == (NightStatus.REJECTED, [*WORSE, "OSError: no space left"])


def test_a_night_whose_publication_fails_behind_the_switch_is_promoted(
    service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_late(run: NightRun) -> Output:
        publication.publish(run)
        return broken(run)

    monkeypatch.setitem(STAGES, "publish", fails_late)
    night = slept(service)
    assert (night.status, night.reasons) == (NightStatus.PROMOTED, [*BETTER, "OSError: no space left"])


def test_a_night_that_is_cancelled_behind_the_switch_is_promoted_and_reports(
    service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled_late(run: NightRun) -> Output:
        output = publication.publish(run)
        cancel(run)
        return output

    monkeypatch.setitem(STAGES, "publish", cancelled_late)
    night = slept(service)
    assert (night.status, night.reasons) == (NightStatus.PROMOTED, BETTER)
    assert night.report_path is not None


def test_a_night_that_was_killed_behind_the_switch_and_then_cancelled_is_promoted(
    service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    def switched(run: NightRun) -> Output:
        run.services.ledger.promote(run.done("train")["generation"], why="better", by="night")
        cancel(run)
        return decided(run)

    monkeypatch.setitem(STAGES, "decide", switched)
    night = slept(service)
    assert (night.status, night.reasons) == (NightStatus.PROMOTED, BETTER)
    assert night.report_path is not None


def test_a_night_that_is_cancelled_before_the_switch_changes_nothing(
    service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancelled_early(run: NightRun) -> Output:
        cancel(run)
        return decided(run)

    monkeypatch.setitem(STAGES, "decide", cancelled_early)
    night, ledger = slept(service), service[1].ledger
    assert (night.status, night.reasons) == (NightStatus.CANCELLED, ["the night was cancelled"])
    assert night.candidate is not None
    assert ledger.generation(night.candidate).status is GenerationStatus.REJECTED


@pytest.fixture
def unwritten(service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch) -> str:
    """A night whose end the ledger refused once."""
    write, refused = Ledger.end_night, Event()

    def full(*args: Any, **kwargs: Any) -> Night:
        if not refused.is_set():
            refused.set()
            raise LedgerError("no room on its disk")
        return write(*args, **kwargs)

    monkeypatch.setattr(Ledger, "end_night", full)
    id = service[0].post("/v1/fine_tuning/jobs", json={}).raise_for_status().json()["id"]
    assert refused.wait(60)
    deadline = time.monotonic() + 60
    while not is_over(id):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert service[1].ledger.night(id).status is NightStatus.RUNNING
    return id


def test_a_night_that_could_not_be_begun_has_failed_and_the_next_one_begins(
    service: tuple[httpx.Client, Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as away:
        away.setattr(DBOS, "start_workflow", full)
        with pytest.raises(OSError, match="no space left"):
            NightSchool(service[1]).start({})
    failed = service[1].ledger.nights()[-1]
    assert (failed.status, failed.reasons) == (NightStatus.FAILED, ["it could not be begun: OSError: no space left"])
    assert slept(service).status is NightStatus.PROMOTED


def test_a_night_whose_end_could_not_be_written_is_ended_by_who_cancels_it(
    service: tuple[httpx.Client, Services], unwritten: str
) -> None:
    service[0].post(f"/v1/fine_tuning/jobs/{unwritten}/cancel").raise_for_status()
    assert service[1].ledger.night(unwritten).status is NightStatus.PROMOTED


def test_a_night_whose_end_could_not_be_written_is_ended_by_the_next_start(
    service: tuple[httpx.Client, Services], unwritten: str
) -> None:
    NightSchool(service[1]).resume()
    assert service[1].ledger.night(unwritten).status is NightStatus.PROMOTED
