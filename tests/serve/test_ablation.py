"""Which nights `bench ablation` lives: the built-in arms, and one for each recipe that another package adds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.recipes import load
from memory.errors import ConfigError
from serve.benches import second_night
from serve.benches.ablation import ARMS, STOCK, VARIABLE, arms
from serve.settings import load_settings
from tests.distill.recipe_package import recipe_installed
from tests.serve.fakes import settings_in


def test_an_installed_recipe_is_an_arm_beside_the_default_night(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "data")
    package = tmp_path / "package"
    package.mkdir()
    with recipe_installed(package) as recipe:
        (full, added) = arms(settings, [f"with {recipe}"])
        assert arms(settings) == [*ARMS, added]
    assert full == ARMS[0]
    assert json.loads(added.settings["NIGHT__RECIPES"]) == [*settings.night.recipes, recipe]


def test_an_installed_recipe_that_cannot_be_loaded_is_told_before_the_first_night(tmp_path: Path) -> None:
    with (
        recipe_installed(tmp_path, "broken = my_recipes:nothing"),
        pytest.raises(ConfigError, match="the recipe 'broken' cannot be loaded"),
    ):
        arms(settings_in(tmp_path / "data"))


def test_an_arm_that_is_none_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no arm 'with sleep'; there are: full, .*with practice"):
        arms(settings_in(tmp_path), ["with sleep"])


def test_the_plain_baseline_can_be_asked_for_alone_and_is_no_night(tmp_path: Path) -> None:
    assert arms(settings_in(tmp_path), [STOCK]) == [ARMS[0]]


def test_every_built_in_arm_is_made_of_settings_and_recipes_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_settings()
    for arm in (*ARMS, *second_night.ARMS):
        with monkeypatch.context() as environment:
            for name, value in arm.settings.items():
                environment.setenv(VARIABLE + name, value)
            changed = load_settings()
        load(changed.night.recipes)
        assert (changed == plain) is not bool(arm.settings), arm.name


def test_a_second_nights_arm_that_is_none_is_refused_before_anything_is_lived(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no arm 'with sleep'; there are: as by default"):
        second_night.forgetting(settings_in(tmp_path), ["with sleep"])


def test_the_second_day_brings_other_workloads_than_the_first_and_the_exam_asks_for_both() -> None:
    first, second = ({task.workload for task in second_night.tasks_of(day)} for day in (1, 2))
    assert not first & second
    (held_out,) = (suite for suite in second_night.suites() if suite.role == "held_out")
    assert {item.task.workload for item in held_out.tasks} == first | second
    taught = {task.fingerprint for day in (1, 2) for task in second_night.tasks_of(day)}
    assert not taught & {item.task.fingerprint for item in held_out.tasks}
