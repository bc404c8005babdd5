"""What a night's report gathers from its stages."""

from __future__ import annotations

from typing import Any

from memory.ledger import Ledger
from memory.night_records import Night, StageRun
from serve.reports import night_report
from tests.serve.test_night_limits import ledger

__all__ = ["ledger"]


def test_what_the_trainer_left_out_is_told_beside_what_the_dataset_did(ledger: Ledger) -> None:
    night = Night()
    ledger.add_night(night)
    figures: dict[str, Any] = dict.fromkeys(("tokens", "trained_tokens", "tokens_per_s", "seconds"), 1)
    trained = {"generation": 1, "sft_rows": 5, "dpo_pairs": 0, "losses": {}, "too_long": 0, "unrendered": 2, **figures}
    for stage, output in (("dataset", {"dropped": {"duplicate": 3}}), ("train", trained)):
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=0.0))
    told = {"duplicate": 3, "rows that the chat template cannot render": 2}
    assert night_report(ledger, night, "m").dropped == told
