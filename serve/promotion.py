"""What is served: the champion, its switch and its way back. The only code that changes it.

The ledger's promotion log is the truth; the engine follows. A request resolves its generation when it
starts and holds it (`Residency.using`) until it ends, so a switch drops nothing.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from typing import Any

from agent.state import ModelRef
from memory import life
from memory.errors import ConfigError, ConflictError, NotFoundError, UnknownModelError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Promotion
from memory.records import Task, text_of
from serve.adapters import Residency

AGENT_MODEL = "nightschool"
CHAMPION_MODEL = "champion"
_GENERATION = re.compile(r"gen-(\d+)")


def ensure_base(ledger: Ledger, base_model: str) -> None:
    """Generation 0, the base model, as the first champion of a new ledger."""
    if not ledger.generations():
        ledger.add_generation(Generation(number=0, base_model=base_model, status=GenerationStatus.CHAMPION))


def resolve(ledger: Ledger, model: str, asker: str | None = None) -> tuple[bool, Generation]:
    """(with the agent?, generation) of a model name: nightschool[:gen-N], champion, gen-N.

    `asker` (see `asker_of`) decides whether a canary answers in the champion's place; nobody's does not.
    UnknownModelError for any other name, with the ones there are.
    """
    name, _, suffix = model.partition(":")
    if model in (AGENT_MODEL, CHAMPION_MODEL):
        canary = ledger.canary() if asker is not None else None
        chosen = canary if canary is not None and _gets(canary, str(asker)) else ledger.serving()
        return model == AGENT_MODEL, chosen
    found = _GENERATION.fullmatch(suffix if name == AGENT_MODEL else model)
    if found is not None:
        with suppress(NotFoundError):
            return name == AGENT_MODEL, ledger.generation(int(found.group(1)))
    raise UnknownModelError(f"The model {model!r} does not exist; there are: {', '.join(model_names(ledger))}")


def asker_of(task: Task) -> str:
    """Who asks, for a canary to be the same to them every time: the user whom the request names, else the conversation
    by its first words. (The key would not do: one application's would send all of its users one way.)"""
    first = next((text_of(m) for m in task.messages if m.get("role") == "user"), "")
    return f"{task.tenant}/{task.safety_identifier or task.user or f'said {first}'}"


def _gets(canary: Generation, asker: str) -> bool:
    # The number is hashed along: every canary meets other users first.
    digest = hashlib.sha256(f"{canary.number}/{asker}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < canary.metrics["canary"]["share"]


def model_names(ledger: Ledger) -> list[str]:
    """All names a client may ask for."""
    numbers = [g.number for g in ledger.generations()]
    return [AGENT_MODEL, CHAMPION_MODEL] + [f"{AGENT_MODEL}:gen-{n}" for n in numbers] + [f"gen-{n}" for n in numbers]


def model_ref(generation: Generation) -> ModelRef:
    """A generation as the agent is handed it."""
    return ModelRef(generation=generation.number, name=generation.served_name)


async def promote(
    ledger: Ledger,
    residency: Residency,
    number: int,
    *,
    why: str,
    by: str,
    expected_from: int | None = None,
    expected_status: GenerationStatus | None = None,
    evidence: dict[str, Any] | None = None,
) -> Promotion:
    """Make generation `number` the champion: load and prove it first, then one ledger transaction.

    The champion before stays loaded for a rollback; what served before it goes once its last request has ended.
    EngineError when the engine cannot serve it; ConflictError when it was rejected or already serves,
    or when another switch came first (since `expected_from` was champion and the generation `expected_status`).
    """
    generation = ledger.generation(number)
    champion = ledger.champion()
    if champion.number == number:
        raise ConflictError(f"generation {number} is the champion already")
    _check_unchanged(champion, expected_from)
    if generation.status is GenerationStatus.REJECTED:
        raise ConflictError(f"generation {number} was rejected by the gate and cannot be promoted")
    await residency.ensure(generation)
    promotion = ledger.promote(
        number,
        why=why,
        by=by,
        expected_from=champion.number,
        expected_status=expected_status,
        evidence=evidence,
    )
    _remind(ledger, number)
    residency.settle(generation, *_canary(ledger), champion)
    return promotion


async def begin_canary(
    ledger: Ledger,
    residency: Residency,
    number: int,
    share: float,
    *,
    why: str,
    by: str,
    expected_from: int | None = None,
) -> Generation:
    """Give generation `number` a share of the users, the same ones every time: loaded and proved first.

    EngineError, ConflictError as `promote`; ConfigError for a share outside 0..1. One canary at a time: another's
    users go back to the champion. What a rollback would bring back stays loaded where the engine has a place for it.
    """
    if not 0 < share < 1:
        raise ConfigError(f"a canary's share lies between 0 and 1, got {share:g}")
    generation, champion = ledger.generation(number), ledger.champion()
    _check_unchanged(champion, expected_from)
    if generation.number == champion.number:
        raise ConflictError(f"generation {number} is the champion already")
    if generation.status is GenerationStatus.REJECTED:
        raise ConflictError(f"generation {number} was rejected by the gate and cannot serve")
    await residency.ensure(generation)
    begun = ledger.begin_canary(number, share, why=why, by=by, expected_from=champion.number)
    residency.settle(*_wanted(ledger))
    return begun


def end_canary(
    ledger: Ledger,
    residency: Residency,
    *,
    why: str,
    by: str,
    expected: int | None = None,
    evidence: dict[str, Any] | None = None,
) -> Promotion:
    """All users back to the champion; the canary is unloaded once its last request has ended.

    ConflictError when no generation (or not the `expected` one) is in canary.
    """
    ended = ledger.end_canary(why, by, expected=expected, evidence=evidence)
    residency.settle(*_wanted(ledger))
    return ended


def _remind(ledger: Ledger, number: int) -> None:
    """What left the prompt since a generation served last was learned by those after it: it needs that again."""
    log = ledger.promotions()
    left = [p.at for p in log if p.from_generation == number]
    if left and number in {0, *(p.to_generation for p in log[:-1])}:
        life.bring_back(ledger.database, left[-1], f"generation {number} serves again")


def _check_unchanged(champion: Generation, expected: int | None) -> None:
    if expected not in (None, champion.number):
        raise ConflictError(f"the champion is generation {champion.number}, not {expected}: it changed meanwhile")


async def rollback(ledger: Ledger, residency: Residency, *, why: str, by: str) -> Promotion:
    """Undo the last switch: end the canary, or go back to the generation that served before the champion.

    ConflictError when there was none.
    """
    if ledger.canary() is not None:
        return end_canary(ledger, residency, why=why, by=by)
    return await promote(ledger, residency, previous_champion(ledger), why=why, by=by)


def ancestry(ledger: Ledger, of: int) -> set[int]:
    """A generation and every one that it was trained from, one after the other."""
    parents = {generation.number: generation.parent for generation in ledger.generations()}
    line: set[int] = set()
    number: int | None = of
    while number is not None and number not in line:
        line.add(number)
        number = parents.get(number)
    return line


def expect_serving(ledger: Ledger, residency: Residency) -> None:
    """Have the engine start with what serves and what a rollback would bring back."""
    residency.expect(*_wanted(ledger))


def _wanted(ledger: Ledger) -> list[Generation]:
    """What stays loaded, the dearest first: the champion, a canary, what a rollback would bring back."""
    wanted = [ledger.champion(), *_canary(ledger)]
    with suppress(ConflictError):
        wanted.append(ledger.generation(previous_champion(ledger)))
    return wanted


def _canary(ledger: Ledger) -> list[Generation]:
    canary = ledger.canary()
    return [canary] if canary is not None else []


def previous_champion(ledger: Ledger) -> int:
    """The generation that a rollback would bring back. ConflictError when there is none.

    The log is read as a stack: going back to a generation forgets those after it, so that rolling back
    twice goes two steps back and not forth again.
    """
    served = [0]
    for promotion in ledger.promotions():
        if promotion.to_generation in served:
            del served[served.index(promotion.to_generation) + 1 :]
        else:
            served.append(promotion.to_generation)
    if len(served) < 2:
        raise ConflictError("there is nothing to roll back to: no generation served before this one")
    return served[-2]
