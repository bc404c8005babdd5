"""A package with the recipe that docs/recipes.md writes in twenty lines, as pip leaves it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "recipes.md"


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    return found


@contextmanager
def recipe_installed(folder: Path, *others: str) -> Iterator[str]:
    """The document's module and its entry point, and `others` ("name = module:attribute"); gives the recipe's name."""
    (folder / "my_recipes.py").write_text(block("python"), encoding="utf-8")
    info = folder / "my_recipes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-recipes\nVersion: 1.0\n", encoding="utf-8")
    group, entry = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(.+)\n', block("toml")).groups()  # pyright: ignore[reportOptionalMemberAccess]
    points = [entry.replace('"', ""), *others]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *points, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield entry.split()[0]
        sys.modules.pop("my_recipes", None)
