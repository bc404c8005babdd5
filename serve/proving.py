"""The service's half of the proof of serving: whether an engine applies an adapter as it was trained.

The engine says the log-probs of a few fixed texts with the adapter and without. What an adapter does to them is
compared with what it did in PEFT (`distill.train.proof`), effect by effect: rounding, which in bfloat16 is a twentieth
of a nat a token, is measured on the base model and not guessed. Owns the comparison, and no loading
(`serve.adapters`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.llm import Endpoint
from distill.train.proof import PROBES, Proof
from memory.errors import EngineError
from serve.engine import request
from serve.engine_settings import BASE_NAME

TIMEOUT_S = 180.0
MIN_DELTA = 1e-3
"""The largest log-prob difference over the probes that an adapter must make, in nats, and with a proof the mean that
it made in training. One that is not applied makes none; batching alone made less than 2e-4 in float32."""
ROUNDING = 2.5
"""So many times the base model's own rounding an adapter's effect may be off, on average. SmolLM2-135M in bfloat16: 1.0
times; without its `v_proj` 1.4 to 3.8, at half its strength 3.3 to 7 times."""
FLOOR = 2e-3
"""What it may be off where nothing is rounded, in nats. In float32 the engine comes within 1e-5."""
STRENGTH = 0.05
"""How far an effect's strength may be from 1, besides three standard errors of rounding. In bfloat16: 0.99 and 1.005 as
trained; 0.85 and 0.76 without `v_proj`, 0.83 and 0.80 without `o_proj`."""
UNSURE = 0.15
"""A standard error of the strength above which two models cannot be told apart."""


@dataclass(frozen=True)
class Probe:
    """What the engine says of the probe prompts with the adapter, beside what it should say, in nats."""

    max_delta: float
    """From the base model: the largest difference at a token."""
    mean_delta: float
    tokens: int
    error: float | None = None
    """The adapter's effect, from what it was in training: the mean difference. None: it has no `proof.json`."""
    strength: float | None = None
    """How strong the effect is beside what it was in training, 1 being as strong."""
    rounding: float | None = None
    """The mean difference of the base model's log-probs from the trainer's."""


async def probe(
    engine: Endpoint,
    name: str,
    proof: Proof | None = None,
    tolerance: float = 0.1,
    others: Mapping[str, Proof] | None = None,
) -> Probe:
    """Prove that the adapter is applied: its log-probs must differ from the base model's and, with the trainer's
    `proof`, by what they differed in training. `tolerance`: the most that the base model may be off, in nats on
    average. `others`: proofs of further adapters by name, none of which may be what answers.

    EngineError when they are not. (Adapters that bind to no module, or that a bug leaves out, serve the
    base model's answers and look healthy: vLLM #48019, verl #7495.)
    """
    prompts: list[Any] = list(PROBES) if proof is None else [row.token_ids for row in proof.rows]
    base, adapted = await asyncio.gather(_logprobs(engine, BASE_NAME, prompts), _logprobs(engine, name, prompts))
    if len(base) != len(adapted):
        raise EngineError(f"the engine gave {len(adapted)} probe tokens for {name} and {len(base)} for the base model")
    deltas = [abs(a - b) for a, b in zip(adapted, base, strict=True)]
    found = Probe(max(deltas), sum(deltas) / len(deltas), len(deltas))
    if proof is not None:
        found = compared(name, proof, base, adapted, tolerance, others or {})
    if not found.max_delta >= MIN_DELTA:
        raise EngineError(
            f"{name} is loaded but changes nothing (largest log-prob difference {found.max_delta:.1e} over "
            f"{found.tokens} tokens): its weights are empty or fit no module of the base model"
        )
    return found


def compared(
    name: str,
    proof: Proof,
    base: Sequence[float],
    adapted: Sequence[float],
    tolerance: float,
    others: Mapping[str, Proof],
) -> Probe:
    """The engine's log-probs without and with the adapter beside the trainer's; EngineError when they are not those
    of the adapter that was trained on this base model."""
    plain, trained = _base(proof), _adapted(proof)
    if len(trained) != len(adapted) or len(plain) != len(base):
        raise EngineError(f"the engine gave {len(adapted)} probe tokens for {name} and the trainer {len(trained)}")
    rounding = _mean(_minus(base, plain))
    if not rounding <= tolerance:
        raise EngineError(
            f"{name} was trained on another base model than the engine serves: without the adapter their log-probs "
            f"differ by {rounding:.2g} nats on average, {tolerance:g} may come from rounding (engine.proof_tolerance)"
        )
    wanted, seen = _minus(trained, plain), _minus(adapted, base)
    if not _mean(wanted) >= MIN_DELTA:
        raise EngineError(
            f"{name} changes nothing: the trainer itself found a difference of only {_mean(wanted):.1e} nats on average"
        )
    noise = _norm(_minus(base, plain)) / math.sqrt(len(base))
    unsure = noise / _norm(wanted)
    if unsure > UNSURE:
        raise EngineError(
            f"{name} cannot be told from the base model: it changes log-probs by {_mean(wanted):.2g} nats on average, "
            f"and rounding alone by {rounding:.2g} (is engine.dtype another than the trainer's?)"
        )
    error, strength = _mean(_minus(seen, wanted)), _along(seen, wanted)
    allowed, slack = max(ROUNDING * rounding, FLOOR), STRENGTH + 3 * unsure
    if not (error <= allowed and abs(strength - 1) <= slack):
        raise EngineError(
            f"{name} is not served as it was trained: its effect on log-probs differs from the trainer's by "
            f"{error:.2g} nats on average ({allowed:.2g} may come from rounding) and is {strength:.2f} times as strong"
        )
    for other, its in others.items():
        if [row.token_ids for row in its.rows] != [row.token_ids for row in proof.rows]:
            continue
        instead = _minus(_adapted(its), _base(its))
        apart = _minus(wanted, instead)
        told_apart = _mean(apart) > FLOOR and _norm(apart) > noise / UNSURE
        if told_apart and _along(_minus(seen, instead), apart) < 0.5:
            raise EngineError(f"{name} is not served as it was trained: the engine answers as {other} in its place")
    deltas = [abs(value) for value in seen]
    return Probe(max(deltas), _mean(seen), len(seen), error, strength, rounding)


def _base(proof: Proof) -> list[float]:
    return [value for row in proof.rows for value in row.base]


def _adapted(proof: Proof) -> list[float]:
    return [value for row in proof.rows for value in row.adapted]


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _mean(values: Sequence[float]) -> float:
    """Of their sizes."""
    return sum(abs(value) for value in values) / len(values)


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def _along(values: Sequence[float], direction: Sequence[float]) -> float:
    """How many times `direction` the values are (least squares)."""
    return math.fsum(a * b for a, b in zip(values, direction, strict=True)) / _norm(direction) ** 2


async def _logprobs(engine: Endpoint, model: str, prompts: list[Any]) -> list[float]:
    """The log-probs of the probe prompts' own tokens, in order; the prompts are texts or token ids."""
    # Prompt log-probs, not generated ones: the same tokens on both sides, and never from the prefix cache.
    payload = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    reply = await request(engine, "POST", "/v1/completions", payload | {"return_token_ids": True}, timeout=TIMEOUT_S)
    values: list[float] = []
    try:
        for choice in sorted(reply["choices"], key=lambda choice: choice["index"]):
            tokens = choice["prompt_token_ids"]
            for token, entry in list(zip(tokens, choice["prompt_logprobs"], strict=True))[1:]:
                values.append(float(entry[str(token)]["logprob"]))
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"the engine gave no prompt log-probs for {model}: {type(exc).__name__} {exc}") from exc
    if not values:
        raise EngineError(f"the engine gave no prompt log-probs for {model}")
    return values
