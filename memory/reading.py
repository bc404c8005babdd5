"""A file's bytes as chunks of text, each with its place: what is stored of a document and looked up again.

Text, Markdown and JSONL are read here, HTML and PDF by `memory.extract`. Owns the forms, their limits and the cutting.
Owns no storage (`memory.documents`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import PurePath

from pydantic import BaseModel, ConfigDict, Field

from memory.errors import ConfigError
from memory.extract import MAX_CHARS, decoded, in_child


class KnowledgeConfig(BaseModel):
    """What documents may be, how they are cut, and how much of them a search shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_file_mb: int = Field(default=32, ge=1, description="larger files are refused")
    max_pages: int = Field(default=2000, ge=1, description="PDFs with more pages are refused")
    chunk_chars: int = Field(default=800, ge=100, description="about how long a passage is; sentences are kept whole")
    hits: int = Field(default=3, ge=1, le=20, description="passages that search_knowledge shows")
    excerpt_chars: int = Field(default=400, ge=40, description="how much of each")
    min_similarity: float = Field(
        default=0.25,
        ge=-1.0,
        le=1.0,
        description="cosine below which a passage counts only if it has the query's words",
    )


class Form(StrEnum):
    """How a document is written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    HTML = "html"
    PDF = "pdf"
    JSONL = "jsonl"


FORMS = {
    ".txt": Form.TEXT,
    ".text": Form.TEXT,
    ".rst": Form.TEXT,
    ".log": Form.TEXT,
    ".csv": Form.TEXT,
    ".md": Form.MARKDOWN,
    ".markdown": Form.MARKDOWN,
    ".html": Form.HTML,
    ".htm": Form.HTML,
    ".xhtml": Form.HTML,
    ".pdf": Form.PDF,
    ".jsonl": Form.JSONL,
    ".ndjson": Form.JSONL,
}
"""By the end of a file's name."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text, and where it stands: under headings, on a page, on lines, as far as its form has these."""

    text: str
    heading: str | None = None
    page: int | None = None
    first_line: int | None = None
    last_line: int | None = None


@dataclass(frozen=True)
class Reading:
    """A document as it was read."""

    form: Form
    title: str | None
    pieces: list[Piece]


def form_of(name: str) -> Form:
    """The form of a file by its name; ConfigError for one that is not known."""
    form = FORMS.get(PurePath(name).suffix.lower())
    if form is None:
        raise ConfigError(f"unknown kind of file; known: {', '.join(sorted(FORMS))}")
    return form


def read(data: bytes, name: str, config: KnowledgeConfig) -> Reading:
    """The document's chunks. ConfigError, saying why, for one that is too large, broken, or without any text."""
    form = form_of(name)
    if len(data) > config.max_file_mb * 1024 * 1024:
        raise ConfigError(f"it is larger than {config.max_file_mb} MB")
    title: str | None = None
    if form in (Form.HTML, Form.PDF):
        title, found = in_child(data, form.value, config.max_pages)
        blocks = [Piece(b["text"], b.get("heading"), b.get("page"), b.get("line"), b.get("last_line")) for b in found]
    else:
        text = decoded(data)
        if len(text) > MAX_CHARS:
            raise ConfigError(f"it holds more than {MAX_CHARS} characters of text")
        reader = {Form.TEXT: _paragraphs, Form.MARKDOWN: _markdown, Form.JSONL: _records}[form]
        blocks = list(reader(text))
    pieces = list(_cut((replace(block, text=_clean(block.text)) for block in blocks), config.chunk_chars))
    if not pieces:
        raise ConfigError("it holds no text" + (" (scanned pages are pictures)" if form is Form.PDF else ""))
    if title is None and pieces[0].heading is not None:
        title = pieces[0].heading.split(" > ")[0]
    return Reading(form, _clean(title) if title else None, pieces)


def _paragraphs(text: str) -> Iterator[Piece]:
    yield from _blocks(enumerate(text.split("\n"), 1), None)


def _blocks(lines: Iterable[tuple[int, str]], heading: str | None) -> Iterator[Piece]:
    """Runs of lines between empty ones; in fenced code empty lines end nothing."""
    held: list[tuple[int, str]] = []
    fence = ""
    for number, line in lines:
        mark = re.match(r" {0,3}(```+|~~~+)", line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark.group(1)
        if line.strip() or (fence and held):
            held.append((number, line))
        elif held:
            yield _joined(held, heading)
            held = []
    if held:
        yield _joined(held, heading)


def _joined(held: list[tuple[int, str]], heading: str | None) -> Piece:
    return Piece("\n".join(line for _, line in held), heading, None, held[0][0], held[-1][0])


def _markdown(text: str) -> Iterator[Piece]:
    above: list[tuple[int, str]] = []
    held: list[tuple[int, str]] = []
    headings: list[tuple[int, str]] = []
    empty = True
    fence = ""
    for number, line in [*enumerate(text.split("\n"), 1), (0, "#")]:
        mark = re.match(r" {0,3}(```+|~~~+)", line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark.group(1)
        begun = None if fence and number else re.match(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$", line)
        if begun is None:
            held.append((number, line))
            continue
        for block in _blocks(held, _path(above)):
            empty = False
            yield block
        title = re.sub(r"[ \t]+#+[ \t]*$", "", begun.group(2) or "").strip()
        level, held = len(begun.group(1)), []
        above = [one for one in above if one[0] < level] + ([(level, title)] if title else [])
        headings.append((number, title))
    if empty:  # an outline
        yield from (Piece(title, None, None, number, number) for number, title in headings if title)


def _path(above: list[tuple[int, str]]) -> str | None:
    return " > ".join(title for _, title in above) or None


def _records(text: str) -> Iterator[Piece]:
    """JSONL: each line a text, or an object with `text` (or `content`) and, where there is one, `title`."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise ConfigError(f"line {number} is no JSON") from exc
        said = given.get("text", given.get("content")) if isinstance(given, dict) else given
        title = given.get("title") if isinstance(given, dict) else None
        if not isinstance(said, str):
            raise ConfigError(f"line {number}: expected a text, or an object with 'text'")
        heading = " ".join(title.split()) if isinstance(title, str) and title.strip() else None
        yield Piece(said, heading, None, number, number)


def _clean(text: str) -> str:
    """Without what no database takes (zero bytes, half surrogate pairs) and what no reader sees."""
    shown = re.sub(r"[^\S\n]+", " ", re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", "", text))
    return re.sub(r" ?\n[\n ]*", "\n", shown.encode("utf-8", "replace").decode()).strip()


def _cut(blocks: Iterable[Piece], size: int) -> Iterator[Piece]:
    """Blocks of one place joined up to `size`; longer ones cut, at the end of a sentence or word where there is one."""
    held: Piece | None = None
    for block in blocks:
        for piece in _parts(block, size):
            near = held is not None and (held.heading, held.page) == (piece.heading, piece.page)
            if held is not None and near and len(held.text) + len(piece.text) < size:
                held = replace(held, text=f"{held.text}\n{piece.text}", last_line=piece.last_line)
                continue
            if held is not None:
                yield held
            held = piece
    if held is not None:
        yield held


def _parts(block: Piece, size: int) -> Iterator[Piece]:
    text, line = block.text, block.first_line
    # Where white space was squeezed, lines cannot be counted in the text any more.
    counted = line is not None and block.last_line == line + text.count("\n")
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= size else _end(text, start, size)
        part = text[start:end].strip()
        if part:
            before = text[: text.index(part, start)].count("\n")
            first = line + before if counted and line is not None else line
            last = first + part.count("\n") if counted and first is not None else block.last_line
            yield replace(block, text=part, first_line=first, last_line=last)
        start = end


def _end(text: str, start: int, size: int) -> int:
    """Where a part that begins at `start` ends: the last end of a line, a sentence or a word in its second half."""
    window = text[start : start + size]
    for ending in (r"\n", r"[.!?。！？](?=\s)", r"\s"):
        ends = [match.end() for match in re.finditer(ending, window) if match.end() > size // 2]
        if ends:
            return start + ends[-1]
    return start + size
