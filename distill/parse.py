"""Reading a principle out of whatever a small model wrote.

Owns the two-line form (`[DESCRIPTION]: …`, `[STRUCTURE]: [(s, p, o), …]`), its repair and the reasons to
drop a reply. Owns no model call and no knowledge of the run the reply is about.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_TEXT = 300
MAX_PART = 80
MAX_TRIPLETS = 8
MAX_REPLY = 8192
"""A longer reply is a loop: what counts stands at its beginning."""

SHAPE = (
    r"\[DESCRIPTION\]: [A-Z][A-Za-z ,;'-]{20,240}\.\n"
    r"\[STRUCTURE\]: \[\([A-Za-z '-]{2,40}, [A-Za-z '-]{2,40}, [A-Za-z '-]{2,40}\)"
    r"(, \([A-Za-z '-]{2,40}, [A-Za-z '-]{2,40}, [A-Za-z '-]{2,40}\)){0,2}\]"
)
"""The form as a regex for the engine's structured outputs. It has no digits: a lesson needs no number."""

Triplet = tuple[str, str, str]


class Flaw(StrEnum):
    """Why a reply became no principle."""

    NO_REPLY = "the model did not reply"
    NO_DESCRIPTION = "no description"
    TOO_SHORT = "no sentence"
    TOO_LONG = "longer than a sentence"
    PROTOCOL = "protocol tags"
    ECHO = "an echo of the instructions"
    ANSWER = "gives the answer away"
    RECALLED = "repeats what was recalled"
    KNOWN = "already known"
    REPEATED = "said twice"


@dataclass(frozen=True)
class Draft:
    """A well-formed principle: one sentence of at most 300 characters, and triplets (perhaps none)."""

    text: str
    structure: list[Triplet]


_HEADING = re.compile(
    r"\[\s{0,3}(?P<boxed>DESCRIPTION|STRUCTURE)\s{0,3}\]\W{0,4}?:?"
    r"|^[ \t*#\-]{0,6}(?P<bare>DESCRIPTION|STRUCTURE)[ \t*]{0,4}:",
    re.IGNORECASE | re.MULTILINE,
)
_TAG = re.compile(
    r"<[/|]?(?:[^\W\d]|\|)[^<>]{0,40}>|<\||\|>|\[/?(?:DESCRIPTION|STRUCTURE|INST)\]|\b(?:Action|Observation)\s{0,3}:",
    re.IGNORECASE,
)
_PART = r"\s{0,8}([^,()\[\]\n]{1,100}),"
_TRIPLET = re.compile(r"[(\[]" + _PART + _PART + r"\s{0,8}([^,()\[\]\n]{1,100})[)\]]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_ECHOES = frozenset({"the sentence", "one sentence", "sentence", "description"})
_PLACEHOLDERS = frozenset({("s", "p", "o"), ("subject", "predicate", "object")})
_QUOTES = " \t\"'`*“”‘’"


def parse_principle(reply: str) -> Draft | Flaw:
    """Read a reply; a `Flaw` when nothing well-formed can be made of it.

    Repaired: marks around the headings, more than one sentence (the first stays), triplets as JSON lists or
    objects, a missing or unreadable structure (none), a missing description (made of the triplets).
    """
    sections = _sections(reply[:MAX_REPLY])
    structure = _triplets(sections.get("STRUCTURE", ""))
    text = _sentence(sections.get("DESCRIPTION", ""))
    if not text and structure:
        text = _sentence("; ".join(" ".join(triplet) for triplet in structure[:2]) + ".")
    if not text:
        return Flaw.NO_DESCRIPTION
    if _TAG.search("\n".join([text, *(part for triplet in structure for part in triplet)])):
        return Flaw.PROTOCOL
    if normal_text(text) in _ECHOES:
        return Flaw.ECHO
    if len(text) > MAX_TEXT:
        return Flaw.TOO_LONG
    if len(re.findall(r"[^\W\d_]{2,}", text)) < 3:
        return Flaw.TOO_SHORT
    return Draft(text, structure)


def normal_text(text: str) -> str:
    """Lower case, words and numbers only: equal ones say the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _sections(reply: str) -> dict[str, str]:
    """Heading -> what follows it up to the next heading; of a repeated heading the first."""
    headings = list(_HEADING.finditer(reply))
    ends = [*(heading.start() for heading in headings), len(reply)][1:]
    found: dict[str, str] = {}
    for heading, end in zip(headings, ends, strict=True):
        name = (heading["boxed"] or heading["bare"]).upper()
        found.setdefault(name, reply[heading.end() : end])
    return found


def _clean(text: str) -> str:
    """One line without control, format and unpaired surrogate characters."""
    printable = "".join(" " if unicodedata.category(char).startswith("C") else char for char in text)
    return " ".join(printable.split())


def _sentence(section: str) -> str:
    first_paragraph = section.strip().split("\n\n", 1)[0]
    text = _clean(first_paragraph).strip(_QUOTES)
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip(_QUOTES)


def _triplets(section: str) -> list[Triplet]:
    found: dict[Triplet, None] = {}
    for parts in _from_json(section) or [match.groups() for match in _TRIPLET.finditer(section)]:
        triplet = tuple(_clean(part).strip(_QUOTES) for part in parts)
        if len(triplet) != 3 or tuple(part.casefold() for part in triplet) in _PLACEHOLDERS:
            continue
        if all(len(part) <= MAX_PART and any(char.isalnum() for char in part) for part in triplet):
            found[triplet] = None
    return list(found)[:MAX_TRIPLETS]


def _from_json(section: str) -> list[list[str]]:
    """Triplets out of a JSON list of lists or of objects; none when it is not JSON."""
    start, end = section.find("["), section.rfind("]")
    if start < 0 or end <= start:
        return []
    try:
        value = json.loads(section[start : end + 1])
    except (ValueError, RecursionError):
        return []
    if len(value) == 3 and all(isinstance(part, str) for part in value):
        value = [value]
    return [parts for parts in map(_parts, value) if parts]


def _parts(item: Any) -> list[str]:
    if isinstance(item, dict):
        named = [item.get(key) for key in ("subject", "predicate", "object")]
        item = named if all(part is not None for part in named) else list(item.values())
    if not isinstance(item, list) or len(item) != 3:
        return []
    if not all(isinstance(part, (str, int, float)) and not isinstance(part, bool) for part in item):
        return []
    return [str(part) for part in item]
