"""The recipe that docs/recipes.md writes in twenty lines, installed and found by name."""

from __future__ import annotations

import pytest

from distill.dataset import DatasetConfig, build
from distill.recipes import load
from memory.errors import ConfigError
from tests.distill.recipe_package import block, recipe_installed
from tests.distill.samples import OneRun, compose, say, snapshot, solve, task, trajectory


@pytest.fixture
def installed(tmp_path):
    with recipe_installed(tmp_path, "broken = my_recipes:nothing", "successes = my_recipes:shown_work") as name:
        yield name


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
