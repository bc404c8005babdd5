"""Text out of HTML and PDF, in a process of its own: what such a file may do to its reader ends with that process.

`in_child` is the caller's side, `main` the child's: bytes in on stdin, blocks out on stdout as JSON. Owns the limits
on time and memory. Owns no chunking (`memory.reading`).
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from memory.errors import ConfigError

CPU_S = 30
WALL_S = 60.0
MEMORY_BYTES = 1 << 30
MAX_CHARS = 8_000_000
"""Of text in one document."""

CHILD = "from memory.extract import main; main()"
REFUSED = 3
"""The child's exit code when what it printed is the reason why the file cannot be read."""

Found = dict[str, Any]
"""A block: `text`, and where it stands (`heading`, `page`, `line`, `last_line`), where that is known."""

_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_UNREAD = frozenset({"script", "style", "template", "noscript", "svg", "head", "iframe", "object"})
_INLINE = frozenset(
    {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd", "mark"}
    | {"q", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr"}
)
"""Every other tag ends a block."""


def in_child(data: bytes, kind: str, max_pages: int) -> tuple[str | None, list[Found]]:
    """Title and blocks of an `html` or `pdf` file; ConfigError, saying why, when it cannot be read in time."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-P", "-c", CHILD, kind, str(max_pages)]
    try:
        child = subprocess.run(
            command,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_S,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as exc:
        raise ConfigError(f"reading it took longer than {WALL_S:.0f} s") from exc
    if child.returncode not in (0, REFUSED):
        raise ConfigError("reading it took too much time or memory, or broke the reader")
    answer = json.loads(child.stdout)
    if child.returncode == REFUSED:
        raise ConfigError(answer)
    return answer["title"], answer["blocks"]


def main() -> None:
    """The child: what was asked for on the command line, the file on stdin."""
    _limit()
    kind, max_pages = sys.argv[1], int(sys.argv[2])
    data = sys.stdin.buffer.read()
    try:
        title, blocks = from_pdf(data, max_pages) if kind == "pdf" else from_html(data)
        if sum(len(block["text"]) for block in blocks) > MAX_CHARS:
            raise ConfigError(f"it holds more than {MAX_CHARS} characters of text")
    except ConfigError as exc:
        sys.stdout.write(json.dumps(str(exc)))
        raise SystemExit(REFUSED) from exc
    sys.stdout.write(json.dumps({"title": title, "blocks": blocks}))


def _limit() -> None:
    import resource

    limits = {resource.RLIMIT_CPU: CPU_S, resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_CORE: 0}
    for limit, most in limits.items():
        with suppress(ValueError, OSError):  # macOS knows no limit of memory
            resource.setrlimit(limit, (most, most))


def from_pdf(data: bytes, max_pages: int) -> tuple[str | None, list[Found]]:
    """A block for each page with text. ConfigError for what is no PDF, is encrypted or has too many pages."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted:
            raise ConfigError("it is encrypted: save it without a password first")
        if len(reader.pages) > max_pages:
            raise ConfigError(f"it has {len(reader.pages)} pages, more than {max_pages}")
        blocks: list[Found] = []
        chars = 0
        for number, page in enumerate(reader.pages, 1):
            text = page.extract_text()
            chars += len(text)
            if chars > MAX_CHARS:
                raise ConfigError(f"it holds more than {MAX_CHARS} characters of text")
            if text.strip():
                blocks.append({"text": text, "page": number})
        title = reader.metadata.title if reader.metadata else None
        return (str(title).strip() or None) if title else None, blocks
    except MemoryError as exc:
        raise ConfigError("reading it takes too much memory") from exc
    except (PyPdfError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError) as exc:
        # pypdf meets a broken file with whatever its own code happens to raise.
        raise ConfigError(f"it is no readable PDF ({type(exc).__name__})") from exc


def from_html(data: bytes) -> tuple[str | None, list[Found]]:
    """A block for each run of text between tags that end one, with the headings above it and its lines."""
    reader = _Page()
    reader.feed(decoded(data))
    reader.close()
    reader.end_block()
    return reader.title, reader.blocks


def decoded(data: bytes) -> str:
    """The text of bytes; ConfigError for what is none."""
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"it is no UTF-8 text (byte {exc.start}): {exc.reason}") from exc
    if "\0" in text:
        raise ConfigError("it is no text: it holds zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Page(HTMLParser):
    """Collects blocks as the parser goes along."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Found] = []
        self.title: str | None = None
        self._above: list[tuple[int, str]] = []
        self._unread: list[str] = []
        self._in_title = False
        self._heading: int | None = None
        self._text: list[str] = []
        self._line: int | None = None
        self._last_line = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title":
            self._in_title = True
        elif tag == "body":
            self._unread.clear()  # a head that was never closed
        if tag in _UNREAD:
            self._unread.append(tag)
        if tag not in _INLINE:
            self.end_block()
        if tag in _HEADINGS:
            self._heading = int(tag[1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE:
            self.end_block()

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        if tag in self._unread:
            while self._unread.pop() != tag:
                pass
        if tag not in _INLINE:
            self.end_block()

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title = self.title or " ".join(data.split()) or None
        if self._unread or not data.strip():
            if self._text and not self._unread:
                self._text.append(" ")
            return
        first = self.getpos()[0] + data[: len(data) - len(data.lstrip())].count("\n")
        self._line = self._line or first
        self._last_line = first + data.strip().count("\n")
        self._text.append(data)

    def end_block(self) -> None:
        """What was read since the last one is a block, or a heading."""
        text = re.sub(r"\s+", " ", "".join(self._text)).strip()
        line, level = self._line, self._heading
        self._text, self._line, self._heading = [], None, None
        if not text:
            return
        if level is not None:
            self._above = [above for above in self._above if above[0] < level] + [(level, text)]
            return
        heading = " > ".join(title for _, title in self._above) or None
        self.blocks.append({"text": text, "heading": heading, "line": line, "last_line": self._last_line})
