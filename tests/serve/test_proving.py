"""What an engine may differ from the trainer by: rounding, as the base model shows it, and nothing else."""

from __future__ import annotations

import random

import pytest

from distill.train.proof import Proof, ProofRow
from memory.errors import EngineError
from serve.proving import Probe, compared

TOKENS = 58
BFLOAT16, FLOAT32 = 0.05, 8e-6
"""Standard deviations of a token's log-prob by rounding, as measured on SmolLM2-135M."""


def effect(seed: int, size: float) -> list[float]:
    """What an adapter does to each token: mostly little, now and then much."""
    draw = random.Random(seed)
    return [draw.choice((-1, 1)) * draw.expovariate(1 / size) for _ in range(TOKENS)]


def proof(of: list[float]) -> Proof:
    base = [-2.0] * TOKENS
    adapted = [b + e for b, e in zip(base, of, strict=True)]
    return Proof(weights_sha256="-", dtype="float32", rows=[ProofRow(token_ids=[1] * 59, base=base, adapted=adapted)])


def seen(trained: list[float], applied: list[float], noise: float, seed: int = 0, **others: Proof) -> Probe:
    """The engine applies one effect where another was trained, and rounds."""
    draw = random.Random(seed)
    base = [-2.0 + draw.gauss(0, noise) for _ in range(TOKENS)]
    adapted = [-2.0 + e + draw.gauss(0, noise) for e in applied]
    return compared("gen-2", proof(trained), base, adapted, 0.1, others)


@pytest.mark.parametrize("noise", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("size", [0.2, 0.5])
def test_an_adapter_is_proved_whatever_the_engine_rounds(noise: float, size: float) -> None:
    for seed in range(200):
        found = seen(effect(seed, size), effect(seed, size), noise, seed)
        assert found.strength == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("noise", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.75, 1.4, 2.0])
def test_an_adapter_that_is_scaled_otherwise_is_refused(noise: float, strength: float) -> None:
    for seed in range(200):
        trained = effect(seed, 0.3)
        with pytest.raises(EngineError, match="not served as it was trained"):
            seen(trained, [strength * e for e in trained], noise, seed)


def test_without_rounding_a_hundredth_of_a_nat_is_too_much() -> None:
    trained = effect(1, 0.3)
    with pytest.raises(EngineError, match="not served as it was trained"):
        seen(trained, [e + 0.01 for e in trained], FLOAT32)


@pytest.mark.parametrize("noise", [FLOAT32, BFLOAT16])
def test_the_adapter_of_the_night_before_in_its_place_is_refused_however_alike_they_are(noise: float) -> None:
    for seed in range(100):
        before = effect(seed, 0.3)
        after = [b + e for b, e in zip(before, effect(1000 + seed, 0.06), strict=True)]
        with pytest.raises(EngineError, match="not served as it was trained"):
            seen(after, before, noise, seed, before=proof(before))
        seen(after, after, noise, seed, before=proof(before))


def test_an_adapter_weaker_than_rounding_cannot_be_proved() -> None:
    with pytest.raises(EngineError, match="cannot be told from the base model"):
        seen(effect(1, 0.01), effect(1, 0.01), BFLOAT16)
