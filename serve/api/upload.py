"""A multipart form with one file, read as it comes: the file's bytes go to disk, never whole into memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request

from memory.files import CHUNK_BYTES
from serve.api.errors import FieldError

MAX_FIELD_BYTES = 10_000
MAX_PARTS = 32


class Sink(Protocol):
    """Where the file's bytes go."""

    def write(self, data: bytes, /) -> Any: ...


@dataclass
class Form:
    """What came: the file's name, None when there was none, and the other fields."""

    filename: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


async def read_form(request: Request, draft: Sink) -> Form:
    """Read the request's form, the part named `file` into the draft.

    FieldError for a body that is no such form. How large it may be is the middleware's to say.
    """
    reader = _Reader(request.headers.get("content-type", ""))
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += reader.feed(chunk)
        if len(waiting) >= CHUNK_BYTES:
            await asyncio.to_thread(draft.write, bytes(waiting))
            waiting.clear()
    if waiting:
        await asyncio.to_thread(draft.write, bytes(waiting))
    return reader.end()


class _Reader:
    """Follows the parser: `feed` returns the file's bytes, what else there is lands in the form."""

    def __init__(self, content_type: str) -> None:
        from python_multipart.multipart import MultipartParser, parse_options_header

        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise FieldError("send the file as multipart/form-data with the fields 'file' and 'purpose'", "file")
        self._form = Form()
        self._parts = 0
        self._bytes = bytearray()
        self._header = [bytearray(), bytearray()]
        self._name = ""
        self._value = bytearray()
        self._ended = False
        callbacks: dict[str, Callable[..., Any]] = {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_end": self._all,
        }
        self._parser = MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]

    def feed(self, chunk: bytes) -> bytes:
        """The file's bytes in this chunk of the body."""
        from python_multipart.exceptions import FormParserError

        self._bytes.clear()
        try:
            self._parser.write(chunk)
        except FormParserError as exc:
            raise FieldError(f"the form cannot be read: {exc}", "file") from exc
        return bytes(self._bytes)

    def end(self) -> Form:
        """The form, once its end was read."""
        if not self._ended:
            raise FieldError("the form breaks off before its end", "file")
        return self._form

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise FieldError(f"the form has more than {MAX_PARTS} parts", "file")
        self._name, self._value = "", bytearray()

    def _header_end(self) -> None:
        from python_multipart.multipart import parse_options_header

        name, value = (bytes(part) for part in self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() != b"content-disposition":
            return
        _, options = parse_options_header(value)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name == "file":
            if self._form.filename is not None:
                raise FieldError("the form has more than one file", "file")
            self._form.filename = options.get(b"filename", b"").decode(errors="replace") or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._bytes += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise FieldError(f"{self._name[:100]}: longer than {MAX_FIELD_BYTES} bytes", self._name[:100])

    def _part_end(self) -> None:
        if self._name != "file":
            self._form.fields[self._name] = self._value.decode(errors="replace")

    def _all(self) -> None:
        self._ended = True
