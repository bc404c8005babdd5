from distill.train.config import TrainConfig
from evals.suites import TRAINED_FAMILIES, reasoning_gym_tasks
from serve.benches.train import blocks, corrected, ways


def test_the_settings_own_number_of_blocks_is_among_the_ways_and_nothing_but_the_way_differs() -> None:
    settings = TrainConfig(layers=7, epochs=3, interpolate=(0.5,), checkpoint_steps=20)
    found = ways(settings)
    assert blocks(7) in found
    for config in found.values():
        same = config.model_copy(update={"profile": settings.profile, "layers": settings.layers})
        assert same == settings.model_copy(update={"interpolate": (), "checkpoint_steps": 0})


def test_every_way_is_given_the_whole_corrected_runs_with_the_system_prompt_that_is_served() -> None:
    tasks = reasoning_gym_tasks(TRAINED_FAMILIES, 1, 5, source="bench")
    rows = corrected(tasks)
    assert {row.task_id for row in rows} <= {task.id for task in tasks}
    assert [m["role"] for m in rows[0].messages[:2]] == ["system", "user"]
    assert rows[0].messages[-1]["role"] == "assistant"
