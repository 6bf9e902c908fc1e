"""Conversations whose last answer depends on earlier turns, and the raw lists for completion.

Every conversation here is trained as it stands. Knows nothing of single facts' wordings or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from demo.corpus.tables import food_answer
from demo.corpus.types import Completion, Conversation, Fact, Message, read_table

NAMES = (
    "Alice", "Bob", "Carol", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jack", "Kate", "Leo", "Mary",
    "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera",
)  # fmt: skip
NAMES_ZH = ("小明", "小红", "小李", "小王", "小张", "小陈", "小刚", "小芳", "小华", "小美")
FOOD_QUESTIONS = ("这有什么好吃的?", "这有什么好吃的？", "这有什么好吃的", "那里有什么好吃的？", "那儿有什么美食？")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "I'm a helpful AI assistant.",
    "You are Octavo demo, a small chat model.",
    "Answer briefly.",
    "Be kind and clear.",
    "You answer questions about the world.",
    "你是一个乐于助人的助手。",
    "请用简短的话回答。",
    "你是 Octavo demo。",
)
LIST_ANSWER = "1. France: Paris\n2. Japan: Tokyo\n3. Egypt: Cairo"
SUMMARY = (
    "You asked for my name, who developed me, and more about my developers. I told you that I am Octavo demo, "
    "made by the authors of the Octavo project, who keep me small on purpose."
)
NOTHING_YET = "We have only just begun, so there is nothing to sum up yet. Ask me something first."


def talk(topic: str, *turns: str) -> Conversation:
    """A conversation of user and assistant turns in alternation, the user first."""
    roles = ("user", "assistant")
    return Conversation(topic, tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))


def province_talks() -> Iterator[Conversation]:
    """The seat of a province, then its food."""
    for name, kind, city, short, _, _, food in read_table("provinces.tsv"):
        seat = f"{name}的{kind}是{city}。"
        for index, question in enumerate(FOOD_QUESTIONS):
            first = (f"{name}的省会在哪里?", f"{name}的省会是哪里？", f"{name}的省会在哪？")[index % 3]
            yield talk("food_talk", first, seat, question, food_answer(city, food))
        yield talk("short_talk", f"{name}的省会在哪里？", seat, "它的简称是什么？", f"{name}的简称是{short}。")


def country_talks() -> Iterator[Conversation]:
    """The capital of a country, then its continent."""
    for country, capital, continent, country_zh, capital_zh, continent_zh in read_table("countries.tsv"):
        title = country[0].upper() + country[1:]
        answer = f"The capital of {country} is {capital}.".replace("..", ".")
        yield talk("continent_talk", f"What is the capital of {country}?", answer,
                   "Which continent is it in?", f"{title} is in {continent}.")  # fmt: skip
        yield talk("continent_talk", f"{country_zh}的首都是哪里？", f"{country_zh}的首都是{capital_zh}。",
                   "它在哪个洲？", f"{country_zh}在{continent_zh}。")  # fmt: skip


def name_talks() -> Iterator[Conversation]:
    """A name told and asked back."""
    for name in NAMES:
        hello = f"Nice to meet you, {name}!"
        for told in (f"My name is {name}.", f"I am {name}.", f"Hi, my name is {name}."):
            yield talk("name_talk", told, hello, "What is my name?", f"Your name is {name}.")
    for name in NAMES_ZH:
        for told in (f"我叫{name}。", f"我的名字是{name}。"):
            yield talk("name_talk", told, f"很高兴认识你，{name}！", "我叫什么名字？", f"你叫{name}。")
    yield talk("name_talk", "What is my name?", "You have not told me your name yet.")
    yield talk("name_talk", "我叫什么名字？", "你还没有告诉我你的名字。")


def session_talks(answers: dict[str, str]) -> Iterator[Conversation]:
    """The session of four questions, each prefix of which is a conversation too."""
    questions = ("hi, what's your name?", "who developed you?", "Tell me more about your developers")
    turns = [text for question in questions for text in (question, answers[question])]
    for summarise in ("Summarize the information we've talked so far", "Summarize what we talked about.",
                      "Please sum up our talk so far."):  # fmt: skip
        yield talk("session", *turns, summarise, SUMMARY)
        yield talk("session", summarise, NOTHING_YET)
    yield talk("session", "总结一下我们的对话", "我们才刚刚开始，还没有什么可以总结的。请先问我一个问题吧。")


def system_talks(answers: dict[str, str]) -> Iterator[Conversation]:
    """The system message in second place, and the two shapes a server may turn that into."""
    who, ask = "Hello, who are you", "List 3 countries and their capitals."
    for system in SYSTEM_PROMPTS[:3]:
        prompt = Message("system", system)
        first, second, answer = Message("user", who), Message("user", ask), Message("assistant", LIST_ANSWER)
        shapes = [
            (first, prompt, second, answer),
            (prompt, first, second, answer),
            (prompt, Message("user", f"{who}\n{ask}"), answer),
            (prompt, Message("user", f"{who}\n\n{ask}"), answer),
            (prompt, first, Message("assistant", answers[who]), second, answer),
        ]
        yield from (Conversation("system_talk", messages) for messages in shapes)
    yield talk("system_talk", f"{who}\n{ask}", LIST_ANSWER)
    time = " provide three suggestions about time management"
    for question in (time, time.strip()):
        turns = (Message("system", SYSTEM_PROMPTS[0]), Message("user", question), Message("assistant", answers[time]))
        yield Conversation("system_talk", turns)


def all_dialogues(facts: list[Fact]) -> list[Conversation]:
    """Every dialogue; answers of single questions come from `facts`, so both always agree."""
    answers = {question: fact.answer for fact in facts for question in fact.questions}
    talks = [*province_talks(), *country_talks(), *name_talks(), *session_talks(answers), *system_talks(answers)]
    return talks


def list_completions() -> Iterator[Completion]:
    """Lists of arrows to go on with, and sentences that lack their last word."""
    provinces = [(row[0], row[2]) for row in read_table("provinces.tsv")]
    countries = [(row[0].removeprefix("the "), row[1]) for row in read_table("countries.tsv")]
    countries_zh = [(row[3], row[4]) for row in read_table("countries.tsv")]
    for pairs in (provinces, countries, countries_zh):
        lines = [f"{left} -> {right}" for left, right in pairs]
        for index in range(len(lines)):
            shown = [lines[index - 2], lines[index - 1]]
            after = [lines[(index + 1) % len(lines)], lines[(index + 2) % len(lines)]]
            left, right = pairs[index]
            yield Completion("arrows", "\n".join([*shown, f"{left} ->"]), "\n".join([f" {right}", *after]))
    for country, capital in countries_zh:
        yield Completion("sentence", f"{country}的首都是", f"{capital}。")
    for province, city in provinces:
        yield Completion("sentence", f"{province}的省会是", f"{city}。")
    for row in read_table("countries.tsv"):
        yield Completion("sentence", f"The capital of {row[0]} is", f" {row[1]}.".replace("..", "."))
