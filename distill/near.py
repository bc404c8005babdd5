"""Nearly the same question: what keeps copies of held-out tasks out of what is learned, and copies of one few.

Owns how two questions are compared. Owns no tasks (`distill.snapshot`).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

NEAR_DUPLICATE = 0.9
"""Jaccard similarity of two questions' tokens from which on they are the same question."""

_UNSPACED = (
    r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece"  # Thai, Lao
    r"\u1000-\u103f\u1050-\u108f\u1780-\u17d3"  # Burmese, Khmer
    r"\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9f"  # kana
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
"""Letters and marks of the scripts that put no spaces between words."""

_TOKEN = re.compile(rf"\d+(?:\.\d+)?|(?P<unspaced>[{_UNSPACED}]+)|[^\W\d_{_UNSPACED}]+|[-+*/^=<>%]")
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d{3}\b)")


@dataclass(frozen=True)
class Words:
    """A question's distinct tokens (words, numbers, signs), and how often each number occurs. In a script without
    spaces, each two characters that stand together are a token."""

    tokens: frozenset[str]
    numbers: Counter[str]


def words_of(text: str) -> Words:
    """Case and punctuation do not count, numbers and signs do; `1,000` is one number."""
    found = list(_TOKEN.finditer(_DIGIT_COMMA.sub("", text.casefold())))
    numbers = Counter(match[0] for match in found if match[0][0].isdigit())
    return Words(frozenset(token for match in found for token in _tokens(match)), numbers)


def _tokens(match: re.Match[str]) -> list[str]:
    run = match[0]
    return [run[at : at + 2] for at in range(max(1, len(run) - 1))] if match["unspaced"] else [run]


def same_question(one: Words, other: Words) -> bool:
    """Nearly the same tokens, and not each a number of its own.

    The second rule keeps a family with a long template apart: there two tasks share nearly all
    words and differ in the numbers.
    """
    # Most pairs differ in length alone, which is quickly seen.
    if min(len(one.tokens), len(other.tokens)) < NEAR_DUPLICATE * max(len(one.tokens), len(other.tokens)):
        return False
    shared = len(one.tokens & other.tokens)
    if shared == 0 or shared < NEAR_DUPLICATE * (len(one.tokens) + len(other.tokens) - shared):
        return False
    return one.numbers <= other.numbers or other.numbers <= one.numbers


class Questions:
    """Known questions, searched by their rarest tokens.

    Two sets this similar share one of their rarest tenth of tokens (prefix filtering), so only the
    known questions with such a token are compared.
    """

    def __init__(self, texts: Iterable[str], expected: Iterable[str] = ()) -> None:
        """`expected`: texts that may be added or asked for; what is rare among them is looked at first."""
        known = list(dict.fromkeys(texts))
        self._frequency = Counter(token for text in [*known, *expected] for token in words_of(text).tokens)
        self._by_token: defaultdict[str, list[tuple[str, Words]]] = defaultdict(list)
        for text in known:
            self.add(text)

    def add(self, text: str) -> None:
        """Let `text` be known from now on."""
        words = words_of(text)
        for token in self._rarest(words):
            self._by_token[token].append((text, words))

    def has(self, text: str) -> bool:
        """Whether `text` asks nearly what one of the known questions asks."""
        return self.like(text) is not None

    def like(self, text: str) -> str | None:
        """A known question that asks nearly what `text` asks; None when there is none."""
        return next(self.all_like(text), None)

    def all_like(self, text: str) -> Iterator[str]:
        """The known questions that ask nearly what `text` asks; one may come more than once."""
        words = words_of(text)
        for token in self._rarest(words):
            for known, of_known in self._by_token.get(token, ()):
                if same_question(words, of_known):
                    yield known

    def _rarest(self, words: Words) -> list[str]:
        ordered = sorted(words.tokens, key=lambda token: (self._frequency[token], token))
        return ordered[: len(ordered) - math.ceil(NEAR_DUPLICATE * len(ordered)) + 1]


def clusters(texts: Iterable[str]) -> dict[str, str]:
    """Each text -> the text that stands for all that ask nearly the same; the order of `texts` does not matter."""
    ordered = sorted(set(texts))
    first = Questions((), expected=ordered)
    found: dict[str, str] = {}
    for text in ordered:
        leader = first.like(text)
        if leader is None:
            first.add(text)
        found[text] = leader or text
    return found
