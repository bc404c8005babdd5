"""What is served: the champion, its switch and its way back. The only code that changes it.

The ledger's promotion log is the truth; the engine follows. A request resolves its generation when it
starts and holds it (`Residency.using`) until it ends, so a switch drops nothing.
"""

from __future__ import annotations

import re
from contextlib import suppress

from agent.state import ModelRef
from memory.errors import ConflictError, NotFoundError, UnknownModelError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Promotion
from serve.adapters import Residency

AGENT_MODEL = "nightschool"
CHAMPION_MODEL = "champion"
_GENERATION = re.compile(r"gen-(\d+)")


def ensure_base(ledger: Ledger, base_model: str) -> None:
    """Generation 0, the base model, as the first champion of a new ledger."""
    if not ledger.generations():
        ledger.add_generation(Generation(number=0, base_model=base_model, status=GenerationStatus.CHAMPION))


def resolve(ledger: Ledger, model: str) -> tuple[bool, Generation]:
    """(with the agent?, generation) of a model name: nightschool[:gen-N], champion, gen-N.

    UnknownModelError for any other name, with the ones there are.
    """
    name, _, suffix = model.partition(":")
    if model in (AGENT_MODEL, CHAMPION_MODEL):
        return model == AGENT_MODEL, ledger.serving()
    found = _GENERATION.fullmatch(suffix if name == AGENT_MODEL else model)
    if found is not None:
        with suppress(NotFoundError):
            return name == AGENT_MODEL, ledger.generation(int(found.group(1)))
    raise UnknownModelError(f"The model {model!r} does not exist; there are: {', '.join(model_names(ledger))}")


def model_names(ledger: Ledger) -> list[str]:
    """All names a client may ask for."""
    numbers = [g.number for g in ledger.generations()]
    return [AGENT_MODEL, CHAMPION_MODEL] + [f"{AGENT_MODEL}:gen-{n}" for n in numbers] + [f"gen-{n}" for n in numbers]


def model_ref(generation: Generation) -> ModelRef:
    """A generation as the agent is handed it."""
    return ModelRef(generation=generation.number, name=generation.served_name)


async def promote(ledger: Ledger, residency: Residency, number: int, *, why: str, by: str) -> Promotion:
    """Make generation `number` the champion: load and prove it first, then one ledger transaction.

    EngineError when the engine cannot serve it; ConflictError when it was rejected or already serves,
    or when another switch came first.
    """
    generation = ledger.generation(number)
    champion = ledger.champion()
    if champion.number == number:
        raise ConflictError(f"generation {number} is the champion already")
    if generation.status is GenerationStatus.REJECTED:
        raise ConflictError(f"generation {number} was rejected by the gate and cannot be promoted")
    await residency.ensure(generation)
    promotion = ledger.promote(number, why=why, by=by, expected_from=champion.number)
    residency.keep(generation, champion)
    return promotion


async def rollback(ledger: Ledger, residency: Residency, *, why: str, by: str) -> Promotion:
    """Back to the generation that served before the champion. ConflictError when there was none."""
    return await promote(ledger, residency, previous_champion(ledger), why=why, by=by)


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
