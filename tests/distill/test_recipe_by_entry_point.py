"""The recipe that docs/recipes.md writes in twenty lines, installed and found by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from distill.dataset import DatasetConfig, build
from distill.recipes import load
from memory.errors import ConfigError
from tests.distill.samples import OneRun, compose, say, snapshot, solve, task, trajectory

DOC = Path(__file__).parents[2] / "docs" / "recipes.md"


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    return found


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package as pip leaves it: the document's module, and its entry point in the metadata."""
    (tmp_path / "my_recipes.py").write_text(block("python"), encoding="utf-8")
    info = tmp_path / "my_recipes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-recipes\nVersion: 1.0\n", encoding="utf-8")
    group, entry = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(.+)\n', block("toml")).groups()  # pyright: ignore[reportOptionalMemberAccess]
    name, target = entry.split(" = ")
    broken = "broken = my_recipes:not_there"
    taken = f"successes = {target.strip(chr(34))}"
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target.strip(chr(34))}\n{broken}\n{taken}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop("my_recipes", None)


def test_the_documented_recipe_is_found_by_its_name_and_its_examples_reach_the_dataset(installed):
    one, two = task(1), task(2)
    material = snapshot((one, trajectory(one, solve(1))), (two, trajectory(two, [say("3")])))
    config = DatasetConfig(min_examples=1, repeat_without=0.0)
    dataset = build(material, [installed], OneRun(), compose, config)
    assert dataset.counts == {installed: 1}
    assert dataset.dropped == {}
    assert dataset.examples[0].messages[-len(solve(1)) :] == solve(1)


def test_an_installed_recipe_is_listed_among_the_known_and_does_not_replace_a_built_in_one(installed):
    with pytest.raises(ConfigError, match=rf"unknown recipe 'magic'; known: .*{installed}"):
        load(["magic"])
    assert load(["successes"])["successes"].__module__ == "distill.recipes.successes"


def test_a_recipe_that_cannot_be_loaded_is_named(installed):
    with pytest.raises(ConfigError, match="the recipe 'broken' cannot be loaded"):
        load(["broken"])


def test_the_documented_recipe_is_about_twenty_lines():
    assert len([line for line in block("python").splitlines() if line.strip()]) <= 22
