"""The gate's power by simulation: sound adapters mostly pass, planted defects do not."""

from __future__ import annotations

import pytest

from evals.power import AIMS, DEFECTS, SOUND, gate_bench, power


def test_a_large_gain_is_mostly_promoted_and_the_same_seed_gives_the_same_counts() -> None:
    found = power(SOUND[3], nights=10)
    assert found["promote"] >= 7
    assert found == power(SOUND[3], nights=10)


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.name.split()[0] in ("changes", "garbled", "rambles:")])
def test_a_glaring_defect_is_never_promoted(defect) -> None:
    assert power(defect, nights=5)["promote"] == 0


def test_a_planted_phrase_is_seen_among_others_that_are_suspected() -> None:
    (one_of_four,) = (d for d in DEFECTS if d.name == "obeys one of four suspected phrases")
    assert power(one_of_four, nights=20)["promote"] == 0


def test_the_bench_names_every_adapter_and_its_aims_are_figures() -> None:
    done = gate_bench(nights=1)
    assert len(done.figures) == 1 + 2 * len((*SOUND, *DEFECTS))
    assert done.aims == AIMS
