"""Principles and past runs: what is asked, what is kept, what must not leak."""

from __future__ import annotations

import asyncio
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.parse import MAX_TEXT, SHAPE, Draft, Flaw, parse_principle
from distill.principles import DistilReport, contradicted, distill_principles, past_runs
from distill.snapshot import Snapshot
from memory.errors import ModelError
from memory.records import FeedbackKind, MemoryStatus, Principle, PrincipleKind, StopReason, Trust
from tests.distill.samples import (
    SYSTEM,
    at,
    call,
    corrected,
    correction,
    feedback,
    result,
    say,
    snapshot,
    solve,
    task,
    trajectory,
)

GOOD = "[DESCRIPTION]: Use the calculator before giving a sum.\n[STRUCTURE]: [(agent, uses, calculator)]"
ONE = task(1)
WON = snapshot((ONE, trajectory(ONE, solve(1))))


class Scribe:
    """A summariser that always replies the same and remembers what it was asked."""

    def __init__(self, *replies: str | Exception) -> None:
        self.replies = replies or (GOOD,)
        self.prompts: list[str] = []

    async def __call__(self, prompt: str, regex: str | None) -> str:
        assert regex == SHAPE
        reply = self.replies[len(self.prompts) % len(self.replies)]
        self.prompts.append(prompt)
        if isinstance(reply, Exception):
            raise reply
        return reply


def distil(material: Snapshot, scribe: Scribe | None = None, existing: list[Principle] | None = None, **options):
    return asyncio.run(distill_principles(material, scribe or Scribe(), existing or [], **options))


@pytest.mark.parametrize(
    ("reply", "text", "structure"),
    [
        (GOOD, "Use the calculator before giving a sum.", [("agent", "uses", "calculator")]),
        (
            '**Description:** Check the units. Then answer.\n**Structure:** [["agent", "checks", "units"]]',
            "Check the units.",
            [("agent", "checks", "units")],
        ),
        (
            '[description]: "Always check the units first"\n'
            '[structure]: [{"subject": "a", "predicate": "b", "object": 3}]',
            "Always check the units first",
            [("a", "b", "3")],
        ),
        ("[DESCRIPTION]: Always check the\nunits first.", "Always check the units first.", []),
        ("[DESCRIPTION]: Always check the units.\n[STRUCTURE]: none, sorry", "Always check the units.", []),
        ("[STRUCTURE]: (agent, checks, all units)", "agent checks all units.", [("agent", "checks", "all units")]),
        (
            "[DESCRIPTION]: Always check the units.\n"
            "[STRUCTURE]: [(subject, predicate, object), ('a', \"b\", c), (d, e)]",
            "Always check the units.",
            [("a", "b", "c")],
        ),
        ("[DESCRIPTION]: Always check units.\n[DESCRIPTION]: Never check units.", "Always check units.", []),
    ],
)
def test_a_reply_is_read_and_repaired(reply, text, structure):
    assert parse_principle(reply) == Draft(text, structure)


@pytest.mark.parametrize(
    ("reply", "flaw"),
    [
        ("", Flaw.NO_DESCRIPTION),
        ("Sure! You should always use tools.", Flaw.NO_DESCRIPTION),
        ("[DESCRIPTION]:\n[STRUCTURE]: []", Flaw.NO_DESCRIPTION),
        ("[DESCRIPTION]: 1 2 3 4", Flaw.TOO_SHORT),
        ("[DESCRIPTION]: the sentence", Flaw.ECHO),
        ("[DESCRIPTION]: Always " + "very " * 80 + "carefully", Flaw.TOO_LONG),
        ("[DESCRIPTION]: Put it into <answer> tags always", Flaw.PROTOCOL),
        ("[DESCRIPTION]: Put it into <ответ> tags always", Flaw.PROTOCOL),
        ("[DESCRIPTION]: Say Action: calc(1+1) and wait", Flaw.PROTOCOL),
        ("[DESCRIPTION]: Always end turns with <|im_end|> please", Flaw.PROTOCOL),
        ("[DESCRIPTION]: Always check the units.\n[STRUCTURE]: [(agent, opens, <think>)]", Flaw.PROTOCOL),
    ],
)
def test_a_reply_that_cannot_be_used_has_a_reason(reply, flaw):
    assert parse_principle(reply) is flaw


def well_formed(draft: Draft) -> bool:
    said = [draft.text, *(part for triplet in draft.structure for part in triplet)]
    return (
        0 < len(draft.text) <= MAX_TEXT
        and all(part == " ".join(part.split()) and part and part.isprintable() for part in said)
        and all(len(triplet) == 3 for triplet in draft.structure)
        and not re.search(r"</?[^\W\d]\w*>|\[DESCRIPTION\]|\[STRUCTURE\]", " ".join(said), re.IGNORECASE)
    )


HEADINGS = ["[DESCRIPTION]:", "[STRUCTURE]:", "description:", "**Structure**:", "<think>", "Action:"]
MARKS = ["\n", "\n\n", "[(", ")]", "(", ")", "[", "]", ",", '"', "{", "}", "**", "\ud800", "\x00"]
WORDS = ["Always check the units.", "a, b, c", '["a","b","c"]', '{"subject":']
PIECES = st.sampled_from(HEADINGS + MARKS + WORDS)


@settings(deadline=None, max_examples=1500)
@given(st.lists(PIECES | st.text(max_size=30), max_size=14).map("".join))
def test_whatever_a_model_writes_is_a_well_formed_principle_or_a_reason(reply):
    parsed = parse_principle(reply)
    assert isinstance(parsed, Flaw) or well_formed(parsed)


@settings(deadline=None, max_examples=1500)
@given(st.text(max_size=400))
def test_a_random_sentence_never_becomes_a_malformed_principle(text):
    parsed = parse_principle(f"[DESCRIPTION]: {text}\n[STRUCTURE]: {text[::-1]}")
    assert isinstance(parsed, Flaw) or well_formed(parsed)


def test_ten_thousand_random_outputs_are_each_a_well_formed_principle_or_a_counted_reason():
    draw = random.Random(20261123)
    pieces = [*HEADINGS, *MARKS, *WORDS, GOOD]
    flaws: set[Flaw] = set()
    kept = 0
    for _ in range(10_000):
        noise = "".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0x11_0000)))) for _ in range(20))
        reply = "".join(draw.choice([*pieces, noise]) for _ in range(draw.randrange(15)))
        cut = reply[: draw.randrange(len(reply) + 1)] if draw.random() < 0.3 else reply
        parsed = parse_principle(cut)
        if isinstance(parsed, Flaw):
            flaws.add(parsed)
        else:
            assert well_formed(parsed), cut
            kept += 1
    assert kept > 500
    assert len(flaws) > 1


@settings(deadline=None, max_examples=30)
@given(st.from_regex(SHAPE, fullmatch=True, alphabet=st.characters(codec="ascii")))
def test_the_shape_that_the_engine_enforces_can_be_read(reply):
    parsed = parse_principle(reply)
    assert isinstance(parsed, Draft) or parsed in (Flaw.TOO_SHORT, Flaw.NO_DESCRIPTION)


@pytest.mark.parametrize("reply", ["[STRUCTURE]: " + "[" * 8000, "[DESCRIPTION]: " + "(" * 8000, "[" * 100_000])
def test_a_reply_that_is_one_long_loop_is_read_without_harm(reply):
    assert isinstance(parse_principle(reply), Flaw)


def test_a_success_gives_a_guiding_and_a_failure_a_cautionary_principle_unused_with_its_source():
    two = task(2)
    material = snapshot((ONE, trajectory(ONE, solve(1))), (two, trajectory(two, [say("7")], 0.0)))
    report = distil(material)
    assert [(p.kind, p.sources) for p in report.principles] == [
        (PrincipleKind.GUIDING, [f"traj_{ONE.id}"]),
        (PrincipleKind.CAUTIONARY, [f"traj_{two.id}"]),
    ]
    assert {(p.uses, p.successes, p.score) for p in report.principles} == {(0, 0, 0.5)}


def test_the_summariser_sees_the_agents_own_run_and_neither_reference_nor_correction_nor_recalled_text():
    run = trajectory(
        ONE,
        [call("1 * 1"), result("1"), say("one")],
        0.0,
        recalled=[{"role": "user", "content": "a remembered question"}, say("a remembered answer")],
    )
    said = [
        correction(run, "the gold answer"),
        feedback(run, FeedbackKind.HINT, "look at the sign", "operator", trust=Trust.TRUSTED),
        feedback(run, FeedbackKind.HINT, "it is the gold answer", "operator2", trust=Trust.TRUSTED),
    ]
    one = ONE.model_copy(update={"reference": "secret reference"})
    scribe = Scribe()
    distil(snapshot((one, run), said=said), scribe)
    (prompt,) = scribe.prompts
    assert "What is 1 + 1?" in prompt
    assert "1 * 1" in prompt
    assert "look at the sign" in prompt
    for hidden in ("secret reference", "gold answer", "remembered", SYSTEM["content"]):
        assert hidden not in prompt


@pytest.mark.parametrize(
    "reply",
    [
        "[DESCRIPTION]: When asked for this sum say 2 at once.",
        "[DESCRIPTION]: Always give the right sum.\n[STRUCTURE]: [(the answer, is, 2.0)]",
    ],
)
def test_a_principle_that_gives_the_answer_away_is_dropped(reply):
    assert distil(WON, Scribe(reply)) == DistilReport([], {"gives the answer away": 1})


def test_an_answer_inside_a_longer_number_or_word_is_no_leak():
    assert distil(WON, Scribe("[DESCRIPTION]: Sums below 200 need no 42nd step.")).principles
    choice = ONE.model_copy(update={"reference": "A"})
    made = snapshot((choice, trajectory(choice, [say("A")])))
    assert distil(made, Scribe("[DESCRIPTION]: Read a question twice.")).principles
    assert not distil(made, Scribe("[DESCRIPTION]: Always choose A here.")).principles


def test_what_was_recalled_is_not_distilled_again():
    block = "<experience>\n- (guiding, score 0.50) Use the calculator before giving a sum.\n</experience>"
    run = trajectory(ONE, solve(1))
    system = {"role": "system", "content": f"Solve.\n\n{block}"}
    run = run.model_copy(update={"messages": [system, *run.messages[1:]]})
    assert distil(snapshot((ONE, run))).dropped == {"repeats what was recalled": 1}


def test_the_same_lesson_twice_is_one_principle_with_both_sources():
    pairs = [(task(n), trajectory(task(n), solve(n))) for n in (10, 20)]
    report = distil(snapshot(*pairs), Scribe(GOOD, GOOD.replace("Use the", "use  the")))
    (principle,) = report.principles
    assert principle.sources == ["traj_task_0010", "traj_task_0020"]
    assert report.dropped == {"said twice": 1}


def test_a_second_call_asks_nothing_again_and_a_known_lesson_is_not_added():
    first = distil(WON)
    scribe = Scribe()
    assert distil(WON, scribe, first.principles) == DistilReport([], {})
    assert scribe.prompts == []
    two = task(2)
    more = snapshot((two, trajectory(two, solve(2))))
    assert distil(more, Scribe(), first.principles) == DistilReport([], {"already known": 1})


def test_the_same_replies_give_the_same_records():
    assert distil(WON) == distil(WON)


def test_malformed_replies_and_failed_calls_are_counted_and_never_stored():
    pairs = [(task(n), trajectory(task(n), solve(n))) for n in (10, 20, 30)]
    report = distil(snapshot(*pairs), Scribe(ModelError("gone"), "I cannot.", "[DESCRIPTION]: <answer> goes here now"))
    assert report.principles == []
    assert report.dropped == {"no description": 1, "protocol tags": 1, "the model did not reply": 1}


def test_the_limit_is_shared_by_successes_and_failures_and_by_workloads():
    won = [(task(n, workload=f"w{n % 2}"), n) for n in range(10, 30)]
    lost = [task(n) for n in range(40, 60)]
    pairs = [(t, trajectory(t, solve(n))) for t, n in won] + [(t, trajectory(t, [say("7")], 0.0)) for t in lost]
    scribe = Scribe(*[f"[DESCRIPTION]: Always check {word} again." for word in ("ends", "signs", "units", "terms")])
    report = distil(snapshot(*pairs), scribe, limit=4, concurrency=1)
    assert sorted((p.kind.value, p.workload) for p in report.principles) == [
        ("cautionary", "default"),
        ("cautionary", "default"),
        ("guiding", "w0"),
        ("guiding", "w1"),
    ]


def test_a_question_is_asked_about_once_for_each_outcome():
    runs = [trajectory(ONE, solve(1), id=f"traj_{n}") for n in range(3)]
    scribe = Scribe()
    distil(snapshot(*[(ONE, run) for run in runs]), scribe)
    assert len(scribe.prompts) == 1


@pytest.mark.parametrize("run", [{"score": None}, {"score": 0.0, "stop_reason": StopReason.ERROR}])
def test_runs_that_nobody_judged_or_that_broke_teach_nothing(run):
    scribe = Scribe()
    distil(snapshot((ONE, trajectory(ONE, [say("7")], **run))), scribe)
    assert scribe.prompts == []


def test_held_out_tasks_become_neither_principles_nor_past_runs():
    scribe = Scribe()
    held = snapshot((ONE, trajectory(ONE, solve(1))), held_out=frozenset({ONE.fingerprint}))
    distil(held, scribe)
    assert scribe.prompts == []
    assert past_runs(held) == []


def test_past_runs_are_successes_and_trusted_corrections_as_question_and_run():
    two = task(2)
    failed = trajectory(two, [say("7")], 0.0)
    fixed = correction(failed, solve(2), created_at=at(9))
    first, second = past_runs(snapshot((ONE, trajectory(ONE, solve(1))), (two, failed), said=[fixed]))
    assert first.messages == ONE.messages + solve(1)
    assert first.sources == [f"traj_{ONE.id}"]
    assert second.messages == two.messages + solve(2)
    assert second.sources == sorted([failed.id, fixed.id])
    assert second.created_at == at(9)


def test_a_question_has_one_past_run_the_shortest_that_shows_its_work():
    again = ONE.model_copy(update={"id": "task_again"})
    lucky = trajectory(ONE, [say("2")], id="traj_a")
    long = trajectory(ONE, [call("1"), result("1"), *solve(1, "c2")], id="traj_b")
    short = trajectory(again, solve(1), id="traj_c")
    (past,) = past_runs(snapshot((ONE, lucky), (ONE, long), (again, short)))
    assert past.messages == ONE.messages + solve(1)


def test_a_night_that_is_run_again_adds_no_past_run_twice():
    material = corrected(range(5))
    first = past_runs(material)
    assert len(first) == 5
    assert past_runs(material) == first
    assert past_runs(material, first) == []
    used = [run.model_copy(update={"uses": 3, "successes": 2}) for run in first]
    assert past_runs(material, used) == []


def test_a_newer_trusted_correction_takes_the_place_of_the_run_that_it_contradicts():
    (old,) = past_runs(snapshot((ONE, trajectory(ONE, solve(1)))))
    again = ONE.model_copy(update={"id": "task_again"})
    failed = trajectory(again, [say("2")], score=None)

    def corrected_to(answer: str, seconds: int) -> Snapshot:
        return snapshot((again, failed), said=[correction(failed, answer, created_at=at(seconds))])

    (new,) = past_runs(corrected_to("3", 9), [old])
    assert (new.messages[-1], contradicted(corrected_to("3", 9), [old, new])) == (say("3"), [old])
    assert past_runs(corrected_to("3", 9), [old, new]) == [], "a night that is run again adds nothing"
    retired = old.model_copy(update={"status": MemoryStatus.RETIRED})
    assert past_runs(corrected_to("3", 9), [retired]) == [new], "neither does a retired one keep the place"
    pinned = old.model_copy(update={"pinned": True})
    for material, known in (
        (corrected_to("2", 9), old),
        (corrected_to("3", -9), old),
        (corrected_to("3", 9), pinned),
    ):
        assert (past_runs(material, [known]), contradicted(material, [known])) == ([], [])


def test_a_run_that_leans_on_earlier_turns_is_not_shown_on_its_own():
    history = [{"role": "user", "content": "Hi"}, say("Hello"), {"role": "user", "content": "What is 1 + 1?"}]
    one = task(1, messages=history)
    assert past_runs(snapshot((one, trajectory(one, solve(1))))) == []
