from __future__ import annotations

import struct
from pathlib import Path

import pytest

from evals.plot import learning_curve, variants
from memory.errors import ConfigError
from tests.evals.test_report import report


def test_the_curve_is_a_png_of_readable_size(tmp_path: Path) -> None:
    data = learning_curve(report()["rows"], tmp_path / "demo" / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 1000
    assert height >= 600


def test_a_row_without_controls_or_with_one_generation_is_drawn(tmp_path: Path) -> None:
    rows = report()["rows"][:1]
    rows[0]["controls"] = {}
    assert learning_curve(rows, tmp_path / "curve.png").is_file()


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to plot"):
        learning_curve([], tmp_path / "curve.png")


def test_variants_are_a_line_each_so_that_the_picture_grows_with_them(tmp_path: Path) -> None:
    def height(count: int) -> int:
        counts = {f"variant {n}": (n, 20) for n in range(count)}
        data = variants(counts, tmp_path / f"{count}.png", "Variants").read_bytes()
        return struct.unpack(">II", data[16:24])[1]

    assert height(15) > height(3) > 100
    with pytest.raises(ConfigError, match="nothing to plot"):
        variants({}, tmp_path / "none.png", "Variants")
