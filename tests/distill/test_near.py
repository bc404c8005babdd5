"""The search for nearly the same question."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from distill.near import Questions, clusters, same_question, words_of

TEXTS = st.lists(st.sampled_from([*"abcdefghijkl", "1", "2", "1,000", "+"]), max_size=24).map(" ".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, max_size=6), TEXTS, st.sampled_from(["", " z", " 7", " z y"]))
def test_the_search_finds_what_comparing_with_every_question_finds(known, text, more):
    everywhere = any(same_question(words_of(text), words_of(question + more)) for question in known)
    assert Questions(question + more for question in known).has(text) == everywhere


def test_a_copy_with_a_number_put_in_front_is_still_the_same_question():
    question = "please add the numbers 17 and 25 and give only the sum as your final answer now"
    assert Questions([question]).has("12: " + question)
    assert not Questions([question]).has(question.replace("25", "26"))


def test_texts_without_words_are_no_questions():
    assert not Questions(["", "?!"]).has("")


@settings(deadline=None, max_examples=100)
@given(st.lists(TEXTS, max_size=8), st.randoms(use_true_random=False))
def test_a_cluster_is_of_what_asks_nearly_the_same_whatever_the_order(texts, random):
    shuffled = texts[:]
    random.shuffle(shuffled)
    found = clusters(texts)
    assert found == clusters(shuffled)
    for text, leader in found.items():
        assert text == leader or same_question(words_of(text), words_of(leader))
        assert found[leader] == leader
