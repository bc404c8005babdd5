"""The recipes that a night runs only when asked: what each makes of a snapshot, and how it reaches the trainer."""

from __future__ import annotations

import pytest

from distill.dataset import DatasetConfig, build
from distill.recipes import RECIPES
from distill.recipes.contrast_runs import contrast_runs
from distill.recipes.dissatisfaction import dissatisfaction, unanswered
from distill.recipes.internalise import internalise
from distill.recipes.intervene import intervene
from distill.recipes.preference import preference
from distill.recipes.revise import revise
from distill.runs import MISTAKE
from distill.sweet_spot import sweet_spot
from distill.train.render import IGNORE, render_pair, render_row
from memory.records import (
    MALFORMED,
    RECALLED,
    Example,
    ExampleKind,
    FeedbackKind,
    MemoryKind,
    Recalled,
    StopReason,
    Task,
    Trajectory,
    Trust,
)
from serve.settings import NightConfig
from tests.distill.samples import (
    START,
    SYSTEM,
    OneRun,
    at,
    call,
    compose,
    correction,
    feedback,
    result,
    say,
    snapshot,
    solve,
    task,
    trajectory,
)
from tests.distill.train_fixtures import make_tokenizer

ONE = task(1)
WRONG = [call("1 + 2", "k"), result("3", "k"), say("3")]
NUMBERS = {"similarity": 0.9, "score": 0.5, "recency": 1.0, "rank": 0.8, "tokens": 9}


def shown(withheld: bool = False) -> Recalled:
    return Recalled(id="prin_1", kind=MemoryKind.PRINCIPLE, why="nearest", withheld=withheld, **NUMBERS)


def helped(of: Task, **fields: object) -> Trajectory:
    return trajectory(of, solve(1), **{"recalled": [say("hint")], **fields}).model_copy(update={"recalled": [shown()]})


def laid_out(material, *recipes: str, **config) -> list[Example]:
    return build(material, recipes, OneRun(), compose, DatasetConfig(min_examples=1, **config)).examples


def scored(on: Trajectory, score: float, author: str = "ann"):
    return feedback(on, FeedbackKind.SCORE, score, author, trust=Trust.TRUSTED)


def over(better: Trajectory, worse: Trajectory, author: str = "operator"):
    return feedback(better, FeedbackKind.PREFERENCE, {"over": worse.id}, author, trust=Trust.TRUSTED)


def test_none_of_them_is_in_a_nights_default_list():
    mine = {"internalise", "intervene", "revise", "dissatisfaction", "preference", "contrast_runs"}
    assert mine < set(RECIPES)
    assert not mine & set(NightConfig().recipes)


def test_a_success_that_memory_helped_with_is_taught_without_what_memory_showed():
    material = snapshot((ONE, helped(ONE)))
    (example,) = internalise(material)
    assert (example.kind, example.messages) == (ExampleKind.SFT, ONE.messages + solve(1))
    (row,) = laid_out(material, "internalise")
    assert row.messages == [SYSTEM, *ONE.messages, *solve(1)]
    assert not row.with_memory


def test_beside_an_ordinary_success_it_adds_the_bare_copy_and_only_once():
    material = snapshot((ONE, helped(ONE)))
    kept_out = laid_out(material, "successes", repeat_without=0.0)
    assert [e.with_memory for e in kept_out] == [True]
    for share in (0.0, 1.0):
        for recipes in (("successes", "internalise"), ("internalise", "successes")):
            rows = laid_out(material, *recipes, repeat_without=share)
            assert sorted(e.with_memory for e in rows) == [False, True]


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(trajectory(ONE, solve(1)), id="nothing shown"),
        pytest.param(
            trajectory(ONE, solve(1)).model_copy(update={"recalled": [shown(withheld=True)]}), id="only withheld"
        ),
        pytest.param(helped(ONE, score=0.0), id="failed"),
    ],
)
def test_a_run_that_memory_did_not_help_to_succeed_internalises_nothing(run: Trajectory):
    assert not list(internalise(snapshot((ONE, run))))


def test_the_first_wrong_step_is_replaced_and_what_follows_is_left_out():
    bad = trajectory(ONE, [call("1  + 0", "k"), result("1", "k"), *WRONG], 0.0)
    better = [call("1 + 0"), result("1"), call("1 + 1", "c2"), result("2", "c2"), say("2")]
    made = snapshot((ONE, bad), said=[correction(bad, better)])
    (example,) = intervene(made)
    assert example.messages == ONE.messages + better[:3]
    assert example.sources == sorted([bad.id, made.feedback[0].id])
    (row,) = laid_out(made, "intervene", repeat_without=0.0)
    assert row.messages[-1] == better[2]


def test_a_wrong_call_is_read_without_loss_and_the_better_runs_tail_is_learned():
    bad = trajectory(ONE, WRONG, 0.0)
    made = snapshot((ONE, bad), said=[correction(bad, solve(1))])
    (example,) = revise(made)
    assert example.messages == [*ONE.messages, {**WRONG[0], "name": MISTAKE}, WRONG[1], *solve(1)]
    (row,) = laid_out(made, "revise", repeat_without=0.0)
    own = row.messages[-len(solve(1)) - 2 :]
    assert [m.get("name") for m in own] == [RECALLED, None, None, None, None]


def test_the_trainer_puts_no_loss_on_the_mistake():
    bad = trajectory(ONE, WRONG, 0.0)
    (row,) = laid_out(snapshot((ONE, bad), said=[correction(bad, solve(1))]), "revise", repeat_without=0.0)
    tokenizer = make_tokenizer()
    rendered = render_row(row, tokenizer)
    pairs = zip(rendered.input_ids, rendered.labels, strict=True)
    learned = tokenizer.decode([token for token, label in pairs if label != IGNORE])
    assert "calc(1 + 1)" in learned
    assert "calc(1 + 2)" not in learned
    assert "calc(1 + 2)" in tokenizer.decode(rendered.input_ids)


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param([say("3")], id="a wrong answer has no observation to turn back after"),
        pytest.param([call("1 + 2")], id="the call was never answered"),
        pytest.param([call("1 + 2"), result("3", "other")], id="another call's result"),
    ],
)
def test_a_mistake_that_cannot_be_read_back_whole_is_not_revised(attempt):
    bad = trajectory(ONE, attempt, 0.0, stop_reason=StopReason.MAX_TURNS)
    made = snapshot((ONE, bad), said=[correction(bad, solve(1))])
    assert list(intervene(made))
    assert not list(revise(made))


def test_an_example_that_ends_with_a_mistake_is_counted_out(monkeypatch):
    wrong = Example(
        recipe="mine", kind=ExampleKind.SFT, task_id=ONE.id, messages=[*ONE.messages, say("3", name=MISTAKE)]
    )
    monkeypatch.setitem(RECIPES, "mine", lambda _snapshot: [wrong])
    made = build(
        snapshot((ONE, trajectory(ONE, solve(1)))),
        ["successes", "mine"],
        OneRun(),
        compose,
        DatasetConfig(min_examples=1),
    )
    assert made.dropped == {"ends with a mistake": 1}


def test_whole_runs_are_compared_from_the_step_at_which_they_part():
    good = trajectory(ONE, [call("1 + 0"), result("1"), *solve(1, "c2")])
    bad = trajectory(ONE, [call("1  + 0", "k"), result("1", "k"), *WRONG], 0.0, id="traj_bad")
    made = snapshot((ONE, good), (ONE, bad))
    (pair,) = contrast_runs(made)
    assert pair.messages == [*ONE.messages, call("1 + 0"), result("1")]
    assert (pair.chosen, pair.rejected) == (solve(1, "c2"), WRONG)
    (row,) = laid_out(made, "contrast_runs")
    rendered = render_pair(row, make_tokenizer())
    assert 0 in rendered.chosen_mask, "the tool's result is read and not preferred"


def test_a_rejected_run_ends_with_a_turn_of_the_agents_and_is_not_much_longer():
    good = trajectory(ONE, solve(1))
    endless = [step for n in range(20) for step in (call(f"1 + {n + 2}", f"k{n}"), result("9", f"k{n}"))]
    bad = trajectory(ONE, endless, 0.0, id="traj_bad", stop_reason=StopReason.MAX_TURNS)
    (pair,) = contrast_runs(snapshot((ONE, good), (ONE, bad)))
    assert pair.rejected == endless[:13]


def test_an_unreadable_turn_is_the_last_of_a_rejected_run():
    attempt = [*WRONG[:2], say("hm", name=MALFORMED), {"role": "user", "content": "Act!"}, say("3")]
    bad = trajectory(ONE, attempt, 0.0, id="traj_bad")
    (pair,) = contrast_runs(snapshot((ONE, trajectory(ONE, solve(1))), (ONE, bad)))
    assert pair.rejected == attempt[:3]


def test_runs_of_one_turn_each_are_left_to_contrast():
    plain = task(1, tools=[])
    good, bad = (trajectory(plain, [say(t)], s, id=f"t{t}", tools=[]) for t, s in (("2", 1.0), ("3", 0.0)))
    assert not list(contrast_runs(snapshot((plain, good), (plain, bad))))


def test_what_a_user_complained_about_is_rejected_for_a_later_success_of_the_newest_model():
    bad = trajectory(ONE, WRONG, None, id="traj_bad")
    older = trajectory(ONE, [call("2 * 1"), result("2"), say("2")], id="traj_older", started_at=at(5))
    newer = trajectory(ONE, solve(1), id="traj_newer", started_at=at(9), generation=1)
    down = scored(bad, 0.0)
    (pair,) = dissatisfaction(snapshot((ONE, bad), (ONE, older), (ONE, newer), said=[down]))
    assert pair.kind is ExampleKind.DPO
    assert (pair.chosen, pair.rejected) == (solve(1)[:1], WRONG[:1])
    assert pair.sources == sorted([bad.id, newer.id, down.id])


@pytest.mark.parametrize(("champion", "chosen_from"), [(None, "traj_newer"), (0, "traj_older"), (2, None)])
def test_the_chosen_side_is_a_sample_of_the_model_that_the_night_goes_on_from(champion, chosen_from):
    bad = trajectory(ONE, WRONG, None, id="traj_bad")
    older = trajectory(ONE, [call("2 * 1"), result("2"), say("2")], id="traj_older", started_at=at(5))
    newer = trajectory(ONE, solve(1), id="traj_newer", started_at=at(9), generation=1)
    runs = [(ONE, run) for run in (bad, older, newer)]
    material = snapshot(*runs, said=[scored(bad, 0.0)], champion=champion)
    pairs = list(dissatisfaction(material))
    assert [chosen_from in pair.sources for pair in pairs] == ([True] if chosen_from else [])
    assert bool(unanswered(material)) is (chosen_from is None)


def test_a_correction_is_a_complaint_too():
    bad = trajectory(ONE, WRONG, None, id="traj_bad")
    good = trajectory(ONE, solve(1), id="traj_good", started_at=at(5))
    said = correction(bad, "2")
    (pair,) = dissatisfaction(snapshot((ONE, bad), (ONE, good), said=[said]))
    assert pair.sources == sorted([bad.id, good.id, said.id])


@pytest.mark.parametrize(
    ("score", "came", "words"),
    [
        pytest.param(0.0, 5, [], id="nobody complained"),
        pytest.param(None, 5, [0.9], id="a user was nearly content"),
        pytest.param(1.0, 5, [0.0], id="its verifier passed it"),
        pytest.param(None, -5, [0.0], id="the success is older than the complaint"),
    ],
)
def test_without_a_complaint_and_a_fresh_success_there_is_no_pair(score, came, words):
    bad = trajectory(ONE, WRONG, score, id="traj_bad")
    good = trajectory(ONE, solve(1), id="traj_good", started_at=at(came))
    said = [scored(bad, value) for value in words]
    assert not list(dissatisfaction(snapshot((ONE, bad), (ONE, good), said=said)))


@pytest.mark.parametrize(("author", "pairs"), [("anonymous", 0), ("ann", 1)])
@pytest.mark.parametrize("name", ["contrast", "contrast_runs", "dissatisfaction", "intervene", "revise"])
def test_a_bad_mark_that_nobody_signed_puts_no_run_behind_another(name: str, author: str, pairs: int):
    bad = trajectory(ONE, WRONG, None, id="traj_bad")
    good = trajectory(ONE, solve(1), id="traj_good", started_at=at(5))
    down = scored(bad, 0.0, author)
    assert len(list(RECIPES[name](snapshot((ONE, bad), (ONE, good), said=[down])))) == pairs


def test_a_trusted_correction_that_nobody_signed_says_what_was_wrong_all_the_same():
    bad = trajectory(ONE, WRONG, None, id="traj_bad")
    assert list(RECIPES["contrast"](snapshot((ONE, bad), said=[correction(bad, solve(1), "anonymous")])))


@pytest.mark.parametrize(("successes", "rejected"), [(2, 0.0), (12, 0.4)])
def test_of_many_complaints_the_one_near_two_sigmas_below_the_mean_is_rejected(successes, rejected):
    runs = {value: trajectory(ONE, [say(f"no {value}")], None, id=f"traj_{value}") for value in (0.0, 0.4)}
    good = [trajectory(ONE, solve(1), id=f"traj_good{n}", started_at=at(5)) for n in range(successes)]
    said = [scored(run, value) for value, run in runs.items()]
    (pair,) = dissatisfaction(snapshot(*[(ONE, run) for run in [*runs.values(), *good]], said=said))
    assert pair.rejected == [say(f"no {rejected}")]


@pytest.mark.parametrize(
    ("scores", "failed", "expected"),
    [
        pytest.param([0.5, 0.6, 0.7, 0.6, 0.6, 0.48, 0.0] + [0.6] * 20, [0.0, 0.3, 0.48], 0.3, id="not the worst"),
        pytest.param([0.0, 1.0], [0.0], 0.0, id="a single one"),
        pytest.param([0.0, 0.0, 1.0], [0.0, 0.4], 0.0, id="below all of them: the worst"),
        pytest.param([0.5, 0.5], [0.4, 0.6], 0.4, id="a tie goes to the lower"),
    ],
)
def test_the_sweet_spot_is_nearest_to_the_mean_minus_two_sigmas(scores, failed, expected):
    assert sweet_spot(scores, [(score, str(score)) for score in failed]) == str(expected)


def test_a_preferred_run_is_chosen_over_the_other():
    better, worse = trajectory(ONE, solve(1), None, id="traj_b"), trajectory(ONE, WRONG, None, id="traj_w")
    word = over(better, worse)
    (pair,) = preference(snapshot((ONE, better), (ONE, worse), said=[word]))
    assert (pair.messages, pair.chosen, pair.rejected) == (ONE.messages, solve(1)[:1], WRONG[:1])
    assert pair.sources == sorted([better.id, worse.id, word.id])


def test_a_preference_teaches_only_when_trusted_uncontradicted_and_about_one_question():
    better, worse = trajectory(ONE, solve(1), None, id="traj_b"), trajectory(ONE, WRONG, None, id="traj_w")
    other = task(2)
    elsewhere = trajectory(other, WRONG, None, id="traj_o")
    failed = trajectory(ONE, solve(1), 0.0, id="traj_f")
    pairs = [(ONE, better), (ONE, worse), (other, elsewhere), (ONE, failed)]
    doubtful = over(better, worse).model_copy(update={"trust": Trust.QUARANTINED})
    for said in (
        [doubtful],
        [over(better, worse), over(worse, better)],
        [over(better, elsewhere)],
        [over(failed, worse)],
    ):
        assert not list(preference(snapshot(*pairs, said=said)))


@pytest.mark.parametrize("name", ["internalise", "intervene", "revise", "dissatisfaction", "preference"])
def test_they_give_the_same_examples_whatever_order_the_records_came_in(name):
    tasks = [task(n) for n in range(4)]
    pairs, said = [], []
    for n, asked in enumerate(tasks):
        good = helped(asked, id=f"traj_good{n}", started_at=at(5)).model_copy(
            update={"messages": trajectory(asked, solve(n)).messages, "answer": str(n + 1)}
        )
        bad = trajectory(asked, WRONG, None, id=f"traj_bad{n}", started_at=START)
        pairs += [(asked, good), (asked, bad)]
        said += [scored(bad, 0.0), correction(bad, solve(n)), over(good, bad)]
    made = [e.model_dump(exclude={"id"}) for e in RECIPES[name](snapshot(*pairs, said=said))]
    turned = [e.model_dump(exclude={"id"}) for e in RECIPES[name](snapshot(*pairs[::-1], said=said[::-1]))]
    assert made == turned
    assert len(made) == 4
