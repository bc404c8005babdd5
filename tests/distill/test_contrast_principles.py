"""Lessons from a success and a failure at the same task; and ten thousand replies through the parser."""

from __future__ import annotations

import asyncio
import random
import time

from distill.parse import Draft, Flaw, parse_principle
from distill.principles import distill_principles
from memory.records import PrincipleKind
from tests.distill.samples import say, snapshot, solve, task, trajectory
from tests.distill.test_principles import GOOD, ONE, Scribe, well_formed

WIN = trajectory(ONE, solve(1), id="traj_win")
LOSS = trajectory(ONE, [say("seven, I guess")], 0.0, id="traj_loss")
DIFFERENT = "[DESCRIPTION]: Call the calculator instead of guessing the sum."


def distil(material, scribe, existing=(), **options):
    return asyncio.run(distill_principles(material, scribe, existing, concurrency=1, **options))


def test_a_success_and_a_failure_at_one_task_give_one_lesson_from_both():
    scribe = Scribe(DIFFERENT, GOOD, "[DESCRIPTION]: Never guess a sum.")
    report = distil(snapshot((ONE, WIN), (ONE, LOSS)), scribe)
    contrast, guiding, cautionary = report.principles
    assert contrast.sources == ["traj_loss", "traj_win"]
    assert contrast.kind is PrincipleKind.GUIDING
    assert (guiding.sources, cautionary.sources) == (["traj_win"], ["traj_loss"])
    won, lost = scribe.prompts[0].split("The attempt that did not:")
    assert "seven, I guess" in lost
    assert "seven, I guess" not in won
    assert "Agent calls calculator" in won


def test_runs_of_different_tasks_are_not_contrasted():
    two = task(2)
    loss = trajectory(two, [say("seven")], 0.0)
    scribe = Scribe(GOOD, "[DESCRIPTION]: Never guess a sum.")
    assert all(len(p.sources) == 1 for p in distil(snapshot((ONE, WIN), (two, loss)), scribe).principles)
    assert len(scribe.prompts) == 2


def test_a_lesson_that_gives_either_runs_answer_away_is_dropped():
    known = GOOD.replace("before giving a sum", "first of all")
    report = distil(snapshot((ONE, WIN), (ONE, LOSS)), Scribe("[DESCRIPTION]: The answer to this is 2.", known, GOOD))
    assert report.dropped == {"gives the answer away": 1}
    assert all(len(p.sources) == 1 for p in report.principles)


def test_a_later_success_is_contrasted_with_a_failure_that_taught_before_and_then_never_again():
    first = distil(snapshot((ONE, LOSS)), Scribe("[DESCRIPTION]: Never guess a sum."))
    scribe = Scribe(DIFFERENT, GOOD)
    second = distil(snapshot((ONE, WIN), (ONE, LOSS)), scribe, first.principles)
    assert [p.sources for p in second.principles] == [["traj_loss", "traj_win"], ["traj_win"]]
    third = Scribe()
    distil(snapshot((ONE, WIN), (ONE, LOSS)), third, [*first.principles, *second.principles])
    assert third.prompts == []


PIECES = [
    "[DESCRIPTION]:", "[STRUCTURE]:", "description:", "**Structure**:", "<think>", "</experience>", "Action:",
    "\n", "\n\n", "[(", ")]", "(", ")", "[", "]", ",", '"', "{", "}", "**", "\ud800", "\x00", "\u202e",
    "Always check the units.", "a, b, c", '["a","b","c"]', '{"subject":', "(agent, checks, units)", "no",
    "\u00e9" * 40, "(" * 300, "[" * 300, "word " * 80, "1e309", "NaN",
]  # fmt: skip


def test_ten_thousand_random_outputs_are_read_quickly_and_come_out_well_formed_or_not_at_all():
    chance, drafts, flaws, slowest = random.Random(7), 0, set[Flaw](), 0.0
    started = time.process_time()
    for _ in range(10_000):
        pieces = [chance.choice(PIECES) for _ in range(chance.randint(0, 24))]
        if chance.random() < 0.3:
            pieces = ["[DESCRIPTION]: ", *pieces]
        began = time.process_time()
        parsed = parse_principle(chance.choice(("", " ")).join(pieces))
        slowest = max(slowest, time.process_time() - began)
        if isinstance(parsed, Draft):
            assert well_formed(parsed)
            drafts += 1
        else:
            flaws.add(parsed)
    assert drafts > 500
    assert len(flaws) >= 4
    assert time.process_time() - started < 60
    assert slowest < 1.0
