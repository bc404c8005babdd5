"""Nearly the same question: the search that keeps copies of held-out tasks out of what is learned.

Owns how two questions are compared. Owns no tasks (`distill.snapshot`).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

NEAR_DUPLICATE = 0.9
"""Jaccard similarity of two questions' tokens from which on they are the same question."""

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>%]")
_DIGIT_COMMA = re.compile(r"(?<=\d),(?=\d{3}\b)")


@dataclass(frozen=True)
class Words:
    """A question's distinct tokens (words, numbers, signs), and how often each number occurs."""

    tokens: frozenset[str]
    numbers: Counter[str]


def words_of(text: str) -> Words:
    """Case and punctuation do not count, numbers and signs do; `1,000` is one number."""
    tokens = _TOKEN.findall(_DIGIT_COMMA.sub("", text.casefold()))
    return Words(frozenset(tokens), Counter(token for token in tokens if token[0].isdigit()))


def same_question(one: Words, other: Words) -> bool:
    """Nearly the same tokens, and not each a number of its own.

    The second rule keeps a family with a long template apart: there two tasks share nearly all
    words and differ in the numbers.
    """
    shared = len(one.tokens & other.tokens)
    if shared == 0 or shared < NEAR_DUPLICATE * (len(one.tokens) + len(other.tokens) - shared):
        return False
    return one.numbers <= other.numbers or other.numbers <= one.numbers


class Questions:
    """Known questions, searched by their rarest tokens.

    Two sets this similar share one of their rarest tenth of tokens (prefix filtering), so only the
    known questions with such a token are compared.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        known = [words_of(text) for text in dict.fromkeys(texts)]
        self._frequency = Counter(token for words in known for token in words.tokens)
        self._by_token: defaultdict[str, list[Words]] = defaultdict(list)
        for words in known:
            for token in self._rarest(words):
                self._by_token[token].append(words)

    def has(self, text: str) -> bool:
        """Whether `text` asks nearly what one of the known questions asks."""
        words = words_of(text)
        return any(
            same_question(words, known) for token in self._rarest(words) for known in self._by_token.get(token, ())
        )

    def _rarest(self, words: Words) -> list[str]:
        ordered = sorted(words.tokens, key=lambda token: (self._frequency[token], token))
        return ordered[: len(ordered) - math.ceil(NEAR_DUPLICATE * len(ordered)) + 1]
