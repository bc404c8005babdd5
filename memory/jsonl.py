"""JSON Lines: where one line ends."""

from __future__ import annotations


def lines_of(text: str) -> list[str]:
    """The lines of a JSON Lines text, without the empty one behind the last line end.

    Not `splitlines`, which cuts at U+2028, U+0085 and others too: JSON holds them in its strings as they are.
    """
    return text.removesuffix("\n").split("\n") if text else []
