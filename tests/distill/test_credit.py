"""Credit: which words may teach."""

from __future__ import annotations

import pytest

from agent.verify import verify
from distill.credit import credit
from memory.errors import VerifierError
from memory.records import Feedback, FeedbackKind, Purpose, Task, Trajectory, Trust, VerifierSpec
from tests.distill.samples import feedback, say, solve, task, trajectory

CORRECTION, SCORE = FeedbackKind.CORRECTION, FeedbackKind.SCORE
OPEN = task(1, reference=None)
"""A task that nothing can verify."""


def judge(said: list[Feedback], runs: list[Trajectory], tasks: list[Task], **options) -> dict[str, Trust]:
    options = {"verify": verify, **options}
    return {j.feedback_id: j.trust for j in credit(said, runs, {t.id: t for t in tasks}, **options)}


def verdict(of: Task, value: object, author: str = "ann", kind: FeedbackKind = CORRECTION, **options) -> tuple:
    run = trajectory(of, [say("no idea")], score=None)
    (judgement,) = credit([feedback(run, kind, value, author)], [run], {of.id: of}, **{"verify": verify, **options})
    return judgement.trust, judgement.reason


def test_a_correction_that_the_verifier_confirms_is_trusted_whoever_wrote_it():
    assert verdict(task(1), "2", "anonymous")[0] is Trust.TRUSTED
    assert verdict(task(1), solve(1))[0] is Trust.TRUSTED


def test_a_correction_that_the_verifier_refutes_is_rejected_even_an_operators():
    assert verdict(task(1), "3", "operator") == (Trust.REJECTED, "the task's verifier gives its answer zero")


@pytest.mark.parametrize("author", ["ann", "key:shop/ann", "app:shop/ann"])
@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_whoever_sent_the_reference_does_not_corroborate_a_correction_with_it(author: str, field: str):
    hers = task(1, reference="poison", **{field: "ann"})
    assert verdict(hers, "poison", author)[0] is Trust.QUARANTINED
    assert verdict(hers, "poison", "bob")[0] is Trust.TRUSTED


def test_a_key_does_not_corroborate_its_own_correction_whatever_users_it_names():
    for user in (None, "carol"):
        asked = task(1, reference="poison", caller="key:eve", user=user)
        for author in ("key:eve", "key:eve/bob"):
            trust, why = verdict(asked, "poison", author)
            assert trust is Trust.QUARANTINED
            assert "sent the yardstick too" in why
        assert verdict(asked, "poison", "key:desk")[0] is Trust.TRUSTED
    vouched = task(1, reference="4", caller="app:shop", user="bob")
    assert verdict(vouched, "4", "app:shop/ann")[0] is Trust.TRUSTED
    assert verdict(vouched, "4", "app:shop/bob")[0] is Trust.QUARANTINED


def test_without_a_verifier_one_users_correction_stays_quarantined_and_an_operators_is_trusted():
    assert verdict(OPEN, "2")[0] is Trust.QUARANTINED
    assert verdict(OPEN, "2", "operator:mia")[0] is Trust.TRUSTED
    assert verdict(OPEN, "2", "mia", operators=frozenset({"mia"}))[0] is Trust.TRUSTED


def test_two_named_authors_with_the_same_answer_to_the_same_question_support_each_other():
    again = OPEN.model_copy(update={"id": "task_again"})
    one, two = trajectory(OPEN, [say("?")], score=None), trajectory(again, [say("?")], score=None)
    said = [feedback(one, CORRECTION, "Two", "ann"), feedback(two, CORRECTION, [say("two ")], "bob")]
    assert set(judge(said, [one, two], [OPEN, again]).values()) == {Trust.TRUSTED}


def test_a_key_that_names_two_authors_is_one_voice_unless_it_vouches_for_them():
    run = trajectory(OPEN, [say("?")], score=None)

    def trust(*authors: str) -> set[Trust]:
        said = [feedback(run, CORRECTION, "2", author, id=f"fb_{i}") for i, author in enumerate(authors)]
        return set(judge(said, [run], [OPEN]).values())

    assert trust("key:shop/ann", "key:shop/bob") == {Trust.QUARANTINED}
    assert trust("key:shop", "key:shop/ann") == {Trust.QUARANTINED}
    assert trust("key:shop/ann", "key:desk/ann") == {Trust.TRUSTED}
    assert trust("app:shop/ann", "app:shop/bob") == {Trust.TRUSTED}


@pytest.mark.parametrize(("authors", "answers"), [(("ann", "ann"), ("2", "2")), (("ann", "bob"), ("2", "3"))])
def test_one_author_twice_or_two_answers_support_nobody(authors, answers):
    run = trajectory(OPEN, [say("?")], score=None)
    said = [
        feedback(run, CORRECTION, answer, author, id=f"fb_{i}")
        for i, (author, answer) in enumerate(zip(authors, answers, strict=True))
    ]
    assert set(judge(said, [run], [OPEN]).values()) == {Trust.QUARANTINED}


def test_the_anonymous_support_nobody_and_nobody_supports_them():
    run = trajectory(OPEN, [say("?")], score=None)
    said = [feedback(run, CORRECTION, "2", "anonymous"), feedback(run, CORRECTION, "2", "ann")]
    assert set(judge(said, [run], [OPEN]).values()) == {Trust.QUARANTINED}


def test_a_rejected_word_supports_nobody_and_a_trusted_one_does():
    run = trajectory(OPEN, [say("?")], score=None)
    mine = feedback(run, CORRECTION, "2", "ann")
    for trust, expected in ((Trust.REJECTED, Trust.QUARANTINED), (Trust.TRUSTED, Trust.TRUSTED)):
        other = feedback(run, CORRECTION, "2", "bob", trust=trust)
        assert judge([mine, other], [run], [OPEN]) == {mine.id: expected}, "what was decided is not judged again"


def test_a_verifier_that_does_not_look_at_the_answer_or_cannot_judge_supports_nobody():
    blind = task(1, verifier=VerifierSpec(name="action"))
    assert verdict(blind, "anything at all")[0] is Trust.QUARANTINED

    def broken(task: Task, answer: str) -> None:
        raise VerifierError("unknown verifier 'x'")

    assert verdict(task(1), "2", verify=broken)[0] is Trust.QUARANTINED


def test_a_broken_correction_is_rejected_with_the_reason():
    trust, reason = verdict(task(1), [{"role": "user", "content": "2"}])
    assert trust is Trust.REJECTED
    assert "assistant and tool messages only" in reason


def test_a_correction_is_not_trusted_for_its_last_answer_with_another_one_before_it():
    trust, reason = verdict(task(1), [say("Visit evil.example"), say("2")])
    assert trust is Trust.REJECTED
    assert "nothing may follow it" in reason


@pytest.mark.parametrize(
    ("score", "value", "trust"),
    [
        (None, True, Trust.TRUSTED),
        (1.0, True, Trust.TRUSTED),
        (0.0, 1.0, Trust.REJECTED),
        (1.0, False, Trust.REJECTED),
        (None, 7, Trust.REJECTED),
        (None, "good", Trust.REJECTED),
    ],
)
def test_a_score_counts_where_no_verifier_contradicts_it(score, value, trust):
    run = trajectory(task(1), [say("2")], score=score)
    said = feedback(run, SCORE, value)
    assert judge([said], [run], [task(1)]) == {said.id: trust}


def test_hints_need_an_operator_and_comments_never_teach():
    assert verdict(task(1), "use the tool", kind=FeedbackKind.HINT)[0] is Trust.QUARANTINED
    assert verdict(task(1), "use the tool", "operator", FeedbackKind.HINT)[0] is Trust.TRUSTED
    assert verdict(task(1), " ", "operator", FeedbackKind.HINT)[0] is Trust.REJECTED
    assert verdict(task(1), "nice", "operator", FeedbackKind.COMMENT)[0] is Trust.QUARANTINED


def test_words_on_evaluations_and_on_other_tenants_runs_are_rejected():
    one = task(1)
    evaluated = trajectory(one, [say("?")], score=None, purpose=Purpose.EVAL)
    assert set(judge([feedback(evaluated, CORRECTION, "2")], [evaluated], [one]).values()) == {Trust.REJECTED}
    served = trajectory(one, [say("?")], score=None)
    foreign = feedback(served, CORRECTION, "2", tenant="other")
    assert set(judge([foreign], [served], [one]).values()) == {Trust.REJECTED}
    assert set(judge([foreign], [], [one]).values()) == {Trust.QUARANTINED}
