"""From whom a night learned, as the morning report tells it."""

from __future__ import annotations

from memory.ledger import Ledger
from memory.records import Example, FeedbackKind, Purpose, Trust
from serve.voices import voices
from tests.memory import samples
from tests.serve.test_night_limits import ledger

__all__ = ["ledger"]


def lesson(ledger: Ledger, question: str, *said: dict[str, object], taught: bool = False, **asked: str) -> Example:
    """An example of a run that somebody asked for, with these words on it."""
    task = samples.task(question).model_copy(update=asked)
    by = {"purpose": Purpose.TEACHER, "model": "teacher:openai/big"} if taught else {}
    run = samples.trajectory(task).model_copy(update=by)
    ledger.add_run(task, run)
    words = [samples.feedback(run).model_copy(update={"id": f"fb_{question}_{n}", **w}) for n, w in enumerate(said)]
    for word in words:
        ledger.add_feedback(word)
    sources = [run.id, *(word.id for word in words)]
    return samples.example(task).model_copy(update={"id": f"ex_{question}", "sources": sources, "tenant": task.tenant})


def told(ledger: Ledger, *examples: Example, named: bool = True) -> dict[str, tuple[int, int]]:
    return {v.who: (v.examples, v.corrections) for v in voices(ledger, examples, named=named)}


def test_who_asked_is_named_where_a_verifier_judged_and_nobody_said_anything(ledger: Ledger) -> None:
    examples = [
        lesson(ledger, "a", user="ann"),
        lesson(ledger, "b", caller="key:shop"),
        lesson(ledger, "c", caller="app:shop", user="ann", safety_identifier="id of ann"),
        lesson(ledger, "d"),
        lesson(ledger, "e"),
    ]
    found = told(ledger, *examples)
    assert found == {
        name: (n, 0) for name, n in {"ann": 1, "key:shop": 1, "app:shop/id of ann": 1, "anonymous": 2}.items()
    }
    assert set(told(ledger, *examples, named=False)) == {"anonymous", "author 2", "author 3", "author 4"}


def test_words_stand_for_those_who_said_them_and_a_hint_beside_who_asked(ledger: Ledger) -> None:
    hint = {"kind": FeedbackKind.HINT, "value": "Add.", "author": "eve", "trust": Trust.TRUSTED}
    examples = [lesson(ledger, "a", {"author": "key:shop/bob"}, user="ann"), lesson(ledger, "b", hint, user="ann")]
    assert told(ledger, *examples) == {"ann": (1, 0), "eve": (1, 0), "key:shop/bob": (1, 1)}


def test_the_teacher_is_a_voice_and_so_is_an_uploaded_file_and_rehearsal_is_nobodys(ledger: Ledger) -> None:
    uploaded = samples.example(samples.task()).model_copy(
        update={"id": "ex_f", "recipe": "file", "sources": ["file-1"]}
    )
    general = samples.example(samples.task()).model_copy(update={"id": "ex_g", "recipe": "rehearsal"})
    examples = [lesson(ledger, "a", taught=True, user="ann"), uploaded, general]
    assert told(ledger, *examples) == {"ann": (1, 0), "file file-1": (1, 0), "teacher:openai/big": (1, 0)}


def test_of_several_tenants_each_voice_is_named_with_its_own(ledger: Ledger) -> None:
    examples = [lesson(ledger, "a", user="ann"), lesson(ledger, "b", user="ann", tenant="acme")]
    assert set(told(ledger, *examples)) == {"ann of default", "ann of acme"}
