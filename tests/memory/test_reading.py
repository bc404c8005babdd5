"""What is read out of a file, where it stood, and what becomes of files that are broken or mean harm."""

from __future__ import annotations

import io
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory import extract
from memory.errors import ConfigError
from memory.reading import Form, KnowledgeConfig, Piece, read

CONFIG = KnowledgeConfig()


def pdf(*pages: str, encrypt: bool = False) -> bytes:
    """A PDF with these pages."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(200, 200)
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content)
    if encrypt:
        writer.encrypt("secret", algorithm="RC4-128")
    held = io.BytesIO()
    writer.write(held)
    return held.getvalue()


def bomb() -> bytes:
    """A small PDF whose one page unfolds to a hundred megabytes."""
    packed = zlib.compress(zlib.compress(b" " * 100_000_000, 1), 9)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << >> >>",
        b"<< /Length %d /Filter [/FlateDecode /FlateDecode] >>\nstream\n%s\nendstream" % (len(packed), packed),
    ]
    out = b"%PDF-1.4\n"
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(out)
    return (
        out
        + b"xref\n0 5\n0000000000 65535 f \n"
        + table
        + (b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start)
    )


def test_markdown_is_cut_by_its_headings_and_keeps_their_lines() -> None:
    text = "# Pumps\n\nAll about pumps.\n\n## Guarantee ##\n\nTwo years.\n\n"
    text += "```\n# no heading\n\nstill code\n```\n## Price\nTen."
    found = read(text.encode(), "pumps.md", CONFIG)
    assert (found.form, found.title) == (Form.MARKDOWN, "Pumps")
    assert found.pieces == [
        Piece("All about pumps.", "Pumps", None, 3, 3),
        Piece("Two years.\n```\n# no heading\nstill code\n```", "Pumps > Guarantee", None, 7, 13),
        Piece("Ten.", "Pumps > Price", None, 15, 15),
    ]


def test_an_outline_without_text_is_not_empty() -> None:
    assert [piece.text for piece in read(b"# One\n## Two\n", "outline.md", CONFIG).pieces] == ["One\nTwo"]


def test_long_text_is_cut_at_sentences_and_every_line_is_named() -> None:
    text = "\n".join(f"Sentence number {n} stands on a line of its own." for n in range(1, 101))
    pieces = read(text.encode(), "long.txt", CONFIG).pieces
    assert len(pieces) > 5
    assert all(len(piece.text) <= CONFIG.chunk_chars for piece in pieces)
    for piece in pieces:
        assert piece.text.startswith(f"Sentence number {piece.first_line} ")
        assert f"number {piece.last_line} " in piece.text.splitlines()[-1]
    assert "\n".join(piece.text for piece in pieces) == text


def test_html_gives_its_text_under_its_headings_and_nothing_that_is_not_shown() -> None:
    page = b"""<html><head><title> Pump
        manual</title><style>p {}</style></head><body><script>alert("x")</script>
<h1>Care</h1><p>Oil it &amp; <b>smile</b>.
<h2>Winter</h2>
<ul><li>Drain it.<li>Cover it.</ul><noscript>no</noscript></body></html>"""
    found = read(page, "manual.html", CONFIG)
    assert found.title == "Pump manual"
    assert [(p.text, p.heading, p.first_line) for p in found.pieces] == [
        ("Oil it & smile.", "Care", 3),
        ("Drain it.\nCover it.", "Care > Winter", 5),
    ]


def test_a_pdf_gives_the_text_of_its_pages() -> None:
    found = read(pdf("The first page.", "The second page."), "two.pdf", CONFIG)
    assert [(piece.text, piece.page) for piece in found.pieces] == [("The first page.", 1), ("The second page.", 2)]


def test_lines_of_json_are_texts_with_titles() -> None:
    lines = [{"text": "One.", "title": "First"}, "Two.", {"content": "Three.", "more": 1}]
    found = read("\n".join(json.dumps(line) for line in lines).encode(), "faq.jsonl", CONFIG)
    assert [(p.text, p.heading, p.first_line) for p in found.pieces] == [
        ("One.", "First", 1),
        ("Two.\nThree.", None, 2),
    ]


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"MZ\x90", "tool.exe", "unknown kind of file"),
        (b"\xff\x00\x12" * 9, "noise.txt", "no UTF-8 text|no text"),
        (b"a\0b", "zero.txt", "zero bytes"),
        (b" \n \n", "blank.txt", "no text"),
        (b"", "empty.md", "no text"),
        (b'{"text": "One."}\n{broken', "half.jsonl", "line 2 is no JSON"),
        (b'{"title": "One."}', "no.jsonl", "line 1: expected a text"),
        (b"[" * 100_000, "deep.jsonl", "line 1 is no JSON"),
        (b"not a pdf", "no.pdf", "no readable PDF"),
        (pdf("Hidden.", encrypt=True), "locked.pdf", "encrypted"),
        (pdf(""), "scan.pdf", "scanned pages"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_reason(data: bytes, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(data, name, CONFIG)


def test_limits_hold_for_size_pages_and_what_a_file_unfolds_to() -> None:
    with pytest.raises(ConfigError, match="larger than 1 MB"):
        read(b"a" * (1024 * 1024 + 1), "big.txt", KnowledgeConfig(max_file_mb=1))
    with pytest.raises(ConfigError, match="2 pages, more than 1"):
        read(pdf("One.", "Two."), "two.pdf", KnowledgeConfig(max_pages=1))
    with pytest.raises(ConfigError):
        read(bomb(), "bomb.pdf", CONFIG)


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        ("while True: pass", "longer than 0 s"),
        ("from memory.extract import _limit; _limit(); b' ' * (1 << 31)", "too much time or memory"),
        ("import os; os.abort()", "too much time or memory"),
    ],
)
def test_a_reader_that_hangs_or_dies_takes_nothing_with_it(
    reader: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract, "WALL_S", 0.4 if "while" in reader else 60.0)
    monkeypatch.setattr(extract, "CHILD", reader)
    with pytest.raises(ConfigError, match=reason):
        read(b"<p>text", "page.html", CONFIG)


@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.md", "a.jsonl"]))
def test_any_bytes_are_read_or_refused(data: bytes, name: str) -> None:
    try:
        pieces = read(data, name, CONFIG).pieces
    except ConfigError:
        return
    assert all(piece.text.strip() == piece.text != "" for piece in pieces)


@given(st.text(alphabet="# \n\tab.", max_size=300))
def test_no_letter_is_lost_and_lines_are_where_they_say(text: str) -> None:
    try:
        pieces = read(text.encode(), "a.txt", KnowledgeConfig(chunk_chars=100)).pieces
    except ConfigError:
        assert not text.split()
        return
    assert "".join("".join(piece.text.split()) for piece in pieces) == "".join(text.split())
    lines = text.split("\n")
    for piece in pieces:
        assert piece.first_line is not None
        assert piece.last_line is not None
        there = "".join("".join(lines[piece.first_line - 1 : piece.last_line]).split())
        assert "".join(piece.text.split()) in there
        assert lines[piece.first_line - 1].strip()
        assert lines[piece.last_line - 1].strip()
