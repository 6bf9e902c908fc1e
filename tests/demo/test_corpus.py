"""The corpus holds every prompt the documentation shows, and its held-out part is never drawn for training."""

from __future__ import annotations

import pytest
from demo.corpus import Conversation, build_corpus
from demo.corpus.build import EpochDrawer, normalise

DOCUMENTED_PROMPTS = (
    "hello, llm",
    "Hello, how are you?",
    "Hello, who are you",
    "List 3 countries and their capitals.",
    "你好!",
    "浙江的省会在哪里?",
    "浙江的省会在哪？",
    "晚上睡不着觉怎么办？",
    "翻译为中文: Hello world",
    "写一个故事",
    "Say this is a test!",
    "Hello! What is your name?",
    "Hello! How are you?",
    "hi, what's your name?",
    "who developed you?",
    "Tell me more about your developers",
    "Summarize the information we've talked so far",
    " provide three suggestions about time management",
    "Hello, who are you\nList 3 countries and their capitals.",
)
RAW_PROMPTS = (
    "Once upon a time",
    "two steps to build a house:",
    "浙江 -> 杭州\n安徽 -> 合肥\n四川 ->",
    "hi",
    "Hello, how are you?",
    "翻译为中文: Hello world",
)


def opening_questions(corpus):
    """Every user message that some trained conversation begins with, a system message aside."""
    openings = {question for _, question, _ in corpus.train_pairs()}
    for dialogue in corpus.dialogues:
        openings.add(next(m.content for m in dialogue.messages if m.role == "user"))
    return openings


@pytest.mark.parametrize("prompt", DOCUMENTED_PROMPTS)
def test_documented_prompt_is_trained(corpus, prompt):
    assert prompt in opening_questions(corpus)


@pytest.mark.parametrize("prompt", RAW_PROMPTS)
def test_documented_raw_prompt_is_trained(corpus, prompt):
    assert prompt in {completion.prompt for completion in corpus.completions}


def test_follow_up_question_is_trained(corpus):
    texts = [tuple(m.content for m in dialogue.messages[:3]) for dialogue in corpus.dialogues]
    assert ("浙江的省会在哪里?", "浙江的省会是杭州。", "这有什么好吃的?") in texts


def test_system_message_in_second_place_is_trained(corpus):
    roles = {tuple(m.role for m in dialogue.messages) for dialogue in corpus.dialogues}
    assert ("user", "system", "user", "assistant") in roles


def test_held_out_wordings_are_never_drawn(corpus):
    held_out = {normalise(question) for _, question, _ in corpus.held_out_pairs()}
    assert len(held_out) > 500
    drawer = EpochDrawer(corpus, seed=7)
    for epoch in range(3):
        for example in drawer.draw(epoch):
            if isinstance(example, Conversation):
                drawn = {normalise(m.content) for m in example.messages if m.role == "user"}
            else:
                drawn = {normalise(example.prompt)}
            assert not drawn & held_out


def test_corpus_and_epochs_are_deterministic(corpus):
    again = build_corpus()
    assert again == corpus
    assert EpochDrawer(corpus, seed=7).draw(3) == EpochDrawer(again, seed=7).draw(3)
    assert EpochDrawer(corpus, seed=7).draw(3) != EpochDrawer(corpus, seed=7).draw(4)


def test_a_question_has_one_answer(corpus):
    answers = {}
    for _, question, answer in [*corpus.train_pairs(), *corpus.held_out_pairs()]:
        assert answers.setdefault(question, answer) == answer, question
