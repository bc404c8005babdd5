"""The search for nearly the same question."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.near import Questions, clusters, same_question, words_of

WORDS = [*"abcdefghijkl", "1", "2", "1,000", "+", "请问今天的天气怎么样", "请问明天的天气怎么样"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=24).map(" ".join)

UNSPACED = [
    # a question, a word of it, another word in its place, another question
    pytest.param(
        "我家附近的图书馆从星期一到星期五上午九点开门,晚上八点关门,周末只开放半天。请问我应该在什么时间去还书,"
        "才不会因为逾期而被罚款?",
        "请问",
        "请说",
        "我想在周末和朋友一起去海边野餐,但是天气预报说可能会下雨。请问我应该准备哪些东西,才不会让大家都淋湿?",
        id="Chinese",
    ),
    pytest.param(
        "駅の近くにある図書館は平日の朝九時に開いて夜八時に閉まりますが、週末は午前中だけ利用できます。延滞の罰金を"
        "払わないためには、いつ本を返しに行けばよいですか。",
        "よいです",
        "いいです",
        "週末に友だちと海へ遊びに行く予定ですが、天気予報では雨が降るかもしれません。みんなが濡れないためには、何を"
        "準備すればよいですか。",
        id="Japanese",
    ),
    pytest.param(
        "ห้องสมุดใกล้บ้านของฉันเปิดตั้งแต่วันจันทร์ถึงวันศุกร์เวลาเก้าโมงเช้าและปิดเวลาสองทุ่มส่วนวันหยุดเปิดแค่ครึ่งวัน"
        "ฉันควรไปคืนหนังสือเวลาไหนจึงจะไม่ถูกปรับ",
        "ฉันควร",
        "เราควร",
        "สุดสัปดาห์นี้ฉันจะไปเที่ยวทะเลกับเพื่อนแต่พยากรณ์อากาศบอกว่าฝนอาจจะตกฉันควรเตรียมอะไรไปบ้างเพื่อไม่ให้ทุกคนเปียก",
        id="Thai",
    ),
]


@settings(deadline=None, max_examples=300)
@given(st.lists(TEXTS, max_size=6), TEXTS, st.sampled_from(["", " z", " 7", " z y"]))
def test_the_search_finds_what_comparing_with_every_question_finds(known, text, more):
    everywhere = any(same_question(words_of(text), words_of(question + more)) for question in known)
    assert Questions(question + more for question in known).has(text) == everywhere


def test_a_copy_with_a_number_put_in_front_is_still_the_same_question():
    question = "please add the numbers 17 and 25 and give only the sum as your final answer now"
    assert Questions([question]).has("12: " + question)
    assert not Questions([question]).has(question.replace("25", "26"))


@pytest.mark.parametrize(("question", "word", "instead", "other"), UNSPACED)
def test_a_copy_in_a_script_without_spaces_is_found_and_another_question_is_not(
    question: str, word: str, instead: str, other: str
):
    assert question.count(word) == 1
    copy = question.replace(word, instead)
    assert Questions([question]).has(copy)
    assert not Questions([question]).has(other)
    assert len(set(clusters([question, copy, other]).values())) == 2


def test_questions_without_spaces_that_differ_in_a_number_are_two():
    question = "小明的书架上有17本故事书,妈妈又给他买了25本漫画书,请问现在书架上一共有多少本书?只回答最后的数字。"
    assert not Questions([question]).has(question.replace("25", "26"))


def test_a_name_in_another_script_leaves_the_other_words_of_a_text_as_they_are():
    assert words_of("Use Python编程 now").tokens == {"use", "python", "编程", "now"}
    assert words_of("한국어 질문입니다").tokens == {"한국어", "질문입니다"}


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
