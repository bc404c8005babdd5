"""What a night's report gathers from its stages."""

from __future__ import annotations

from typing import Any

import pytest

from evals.night_page import render_night
from memory.ledger import Ledger
from memory.night_records import Night, StageRun
from serve.reports import night_report
from tests.serve.test_night_limits import ledger

__all__ = ["ledger"]


FIGURES: dict[str, Any] = dict.fromkeys(("tokens", "trained_tokens", "tokens_per_s", "seconds"), 1)
TRAINED = {"generation": 1, "sft_rows": 5, "dpo_pairs": 0, "losses": {}, "too_long": 0, "unrendered": 2, **FIGURES}


def a_night(ledger: Ledger, trained: dict[str, Any]) -> Night:
    night = Night()
    ledger.add_night(night)
    for stage, output in (("dataset", {"dropped": {"duplicate": 3}}), ("train", trained)):
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=0.0))
    return night


def test_what_the_trainer_left_out_is_told_beside_what_the_dataset_did(ledger: Ledger) -> None:
    told = {"duplicate": 3, "rows that the chat template cannot render": 2}
    assert night_report(ledger, a_night(ledger, TRAINED), "m").dropped == told


@pytest.mark.parametrize(("chosen", "told"), [({}, False), ({"alpha": 0.7, "losses": {}, "lost": 0.0}, True)])
def test_the_report_says_how_far_from_the_champion_the_weights_lie(
    ledger: Ledger, chosen: dict[str, Any], told: bool
) -> None:
    night = a_night(ledger, TRAINED | {"interpolation": chosen or None})
    assert ("Validation chose 70% of the way" in render_night(night_report(ledger, night, "m"))) is told
