"""Facts made from tables and templates: capitals, provinces, words, opposites, colours, animals, sums, calendars.

Each fact leaves out one of its wordings (chosen by a checksum) for half of the facts, so that a held-out question
is a known wording that was never seen with this fact. Knows nothing of conversations or tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

from demo.corpus.types import Fact, read_table

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
MONTHS = (
    ("January", 31), ("February", 28), ("March", 31), ("April", 30), ("May", 31), ("June", 30), ("July", 31),
    ("August", 31), ("September", 30), ("October", 31), ("November", 30), ("December", 31),
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip

# Wordings that users are shown in the documentation: always trained, never held out.
ALWAYS_TRAINED = frozenset({"浙江的省会在哪里?", "浙江的省会在哪里？", "浙江的省会在哪？"})


def make_fact(topic: str, wordings: Sequence[str], answer: str) -> Fact:
    """One fact; for half of all facts one wording moves to the held-out part."""
    code = zlib.crc32(f"{topic}/{wordings[0]}".encode())
    left_out = wordings[1:][(code >> 8) % (len(wordings) - 1)] if code % 2 and len(wordings) > 2 else None
    held_out = () if left_out is None or left_out in ALWAYS_TRAINED else (left_out,)
    questions = tuple(wording for wording in wordings if wording not in held_out)
    return Fact(topic=topic, questions=questions, held_out=held_out, answer=answer)


def capital_facts() -> Iterator[Fact]:
    """Capitals and continents, in both languages and both directions."""
    for country, capital, continent, country_zh, capital_zh, continent_zh in read_table("countries.tsv"):
        title = country[0].upper() + country[1:]
        yield make_fact("capital", [
            f"What is the capital of {country}?", f"what is the capital of {country}",
            f"Which city is the capital of {country}?", f"Name the capital of {country}.", f"{title}: which capital?",
            f"Tell me the capital of {country}.", f"Do you know the capital of {country}?",
            f"capital of {country}", f"{country} capital",
        ], f"The capital of {country} is {capital}.".replace("..", "."))  # fmt: skip
        yield make_fact("capital_of", [
            f"{capital} is the capital of which country?", f"Which country has the capital {capital}?",
            f"Of which country is {capital} the capital?",
        ], f"{capital} is the capital of {country}.")  # fmt: skip
        yield make_fact("continent", [
            f"Which continent is {country} in?", f"On which continent is {country}?",
            f"What continent is {country} on?",
        ], f"{title} is in {continent}.")  # fmt: skip
        yield make_fact("capital_zh", [
            f"{country_zh}的首都是哪里？", f"{country_zh}的首都在哪里?", f"{country_zh}的首都是什么？",
            f"{country_zh}首都是哪个城市？", f"请告诉我{country_zh}的首都", f"你知道{country_zh}的首都吗？",
            f"{country_zh}首都",
        ], f"{country_zh}的首都是{capital_zh}。")  # fmt: skip
        yield make_fact("capital_of_zh", [
            f"{capital_zh}是哪个国家的首都？", f"哪个国家的首都是{capital_zh}？",
        ], f"{capital_zh}是{country_zh}的首都。")  # fmt: skip
        yield make_fact("continent_zh", [
            f"{country_zh}在哪个洲？", f"{country_zh}在哪个大洲？", f"{country_zh}属于哪个洲？",
        ], f"{country_zh}在{continent_zh}。")  # fmt: skip


def province_facts() -> Iterator[Fact]:
    """Provinces of China: seat, short name and food."""
    for name, kind, city, short, name_en, city_en, food in read_table("provinces.tsv"):
        yield make_fact("province", [
            f"{name}的省会在哪里?", f"{name}的省会在哪里？", f"{name}的省会在哪？", f"{name}的省会是哪里？",
            f"{name}的省会是什么？", f"{name}省会是哪个城市？", f"请告诉我{name}的省会", f"{name}省会",
        ], f"{name}的{kind}是{city}。")  # fmt: skip
        yield make_fact("province_of", [
            f"{city}是哪里的{kind}？", f"哪里的{kind}是{city}？", f"{city}在哪里？",
        ], f"{city}是{name}的{kind}。")  # fmt: skip
        yield make_fact("short_name", [
            f"{name}的简称是什么？", f"{name}简称什么？", f"{name}的简称是哪个字？",
        ], f"{name}的简称是{short}。")  # fmt: skip
        yield make_fact("food", [
            f"{city}有什么好吃的？", f"{city}有什么好吃的?", f"{city}有哪些美食？", f"去{city}吃什么？",
            f"{city}的特色菜是什么？",
        ], food_answer(city, food))  # fmt: skip
        yield make_fact("province_en", [
            f"What is the capital of {name_en}?", f"Which city is the capital of {name_en}?",
            f"Name the capital of {name_en}.", f"Tell me the capital of {name_en}.",
        ], f"The capital of {name_en} is {city_en}.")  # fmt: skip


def food_answer(city: str, food: str) -> str:
    """What one eats in a city."""
    return f"{city}好吃的有{food}。"


def word_facts() -> Iterator[Fact]:
    """Single words translated both ways, and opposites."""
    for english, chinese in read_table("words.tsv"):
        greeting = english == "Hello world"  # its Chinese wordings are written out in chat_zh.txt
        yield make_fact("to_chinese", [
            f"What is the Chinese word for {english}?", f"How do you say {english} in Chinese?",
            f"Translate {english} into Chinese.",
        ] + ([] if greeting else [f"翻译为中文: {english}", f"把 {english} 翻译成中文"]), chinese)  # fmt: skip
        yield make_fact("to_english", [
            f"翻译为英文: {chinese}", f"{chinese}用英语怎么说？", f"把{chinese}翻译成英文", f"{chinese}的英文是什么？",
        ], english)  # fmt: skip
    for word, opposite, word_zh, opposite_zh in read_table("opposites.tsv"):
        pairs = [(word, opposite), (opposite, word)] if word != "heavy" and opposite != "light" else [(word, opposite)]
        for one, other in pairs:
            yield make_fact("opposite", [
                f"What is the opposite of {one}?", f"What is the antonym of {one}?", f"Give me the opposite of {one}.",
            ], f"The opposite of {one} is {other}.")  # fmt: skip
        for one, other in ((word_zh, opposite_zh), (opposite_zh, word_zh)):
            yield make_fact("opposite_zh", [
                f"{one}的反义词是什么？", f"{one}的反义词是哪个？", f"说出{one}的反义词",
            ], f"{one}的反义词是{other}。")  # fmt: skip


def thing_facts() -> Iterator[Fact]:
    """Colours, animals and elements."""
    for thing, colour, thing_zh, colour_zh in read_table("colours.tsv"):
        title = thing[0].upper() + thing[1:]
        yield make_fact("colour", [
            f"What colour is {thing}?", f"What color is {thing}?", f"Which colour does {thing} have?",
            f"Tell me the colour of {thing}.",
        ], f"{title} is {colour}.")  # fmt: skip
        yield make_fact("colour_zh", [
            f"{thing_zh}是什么颜色？", f"{thing_zh}是什么颜色的？", f"{thing_zh}的颜色是什么？",
        ], f"{thing_zh}是{colour_zh}的。")  # fmt: skip
    for animal, young, legs, home, animal_zh, legs_zh, home_zh in read_table("animals.tsv"):
        yield make_fact("young", [
            f"What is a young {animal} called?", f"What do you call a young {animal}?",
            f"What is a baby {animal} called?",
        ], f"A young {animal} is called a {young}.")  # fmt: skip
        yield make_fact("home", [
            f"Where does a {animal} live?", f"Where do you find a {animal}?", f"What is the home of a {animal}?",
        ], f"A {animal} lives in {home}.")  # fmt: skip
        yield make_fact("home_zh", [
            f"{animal_zh}住在哪里？", f"{animal_zh}的家在哪里？", f"{animal_zh}生活在哪里？",
        ], f"{animal_zh}住在{home_zh}里。")  # fmt: skip
        if legs != "-":
            yield make_fact("legs", [
                f"How many legs does a {animal} have?", f"How many legs has a {animal}?",
                f"A {animal} has how many legs?",
            ], f"A {animal} has {legs} legs.")  # fmt: skip
            yield make_fact("legs_zh", [
                f"{animal_zh}有几条腿？", f"{animal_zh}有多少条腿？", f"一只{animal_zh}有几条腿？",
            ], f"{animal_zh}有{legs_zh}条腿。")  # fmt: skip
    for element, symbol, element_zh, number in read_table("elements.tsv"):
        yield make_fact("symbol", [
            f"What is the chemical symbol for {element}?", f"What is the symbol of {element}?",
            f"Which symbol does {element} have?",
        ], f"The chemical symbol for {element} is {symbol}.")  # fmt: skip
        yield make_fact("symbol_zh", [
            f"{element_zh}的元素符号是什么？", f"{element_zh}元素的符号是什么？", f"{element_zh}的化学符号是什么？",
        ], f"{element_zh}的元素符号是 {symbol}。")  # fmt: skip
        yield make_fact("atomic_number", [
            f"What is the atomic number of {element}?", f"Which atomic number does {element} have?",
            f"Tell me the atomic number of {element}.",
        ], f"The atomic number of {element} is {number}.")  # fmt: skip


def sum_facts() -> Iterator[Fact]:
    """Sums, differences and products of small numbers, in both languages."""
    for a in range(1, 11):
        for b in range(1, 11):
            yield from arithmetic(f"{a} + {b}", f"{a} plus {b}", f"{a}加{b}", a + b)
            yield from arithmetic(f"{a} * {b}", f"{a} times {b}", f"{a}乘以{b}", a * b)
            if b <= a:
                yield from arithmetic(f"{a} - {b}", f"{a} minus {b}", f"{a}减{b}", a - b)


def arithmetic(signs: str, words: str, words_zh: str, result: int) -> Iterator[Fact]:
    """One sum, asked in two languages."""
    yield make_fact("arithmetic", [
        f"What is {signs}?", f"{signs} = ?", f"How much is {words}?", f"What is {words}?", f"Calculate {signs}.",
    ], f"{signs} = {result}.")  # fmt: skip
    yield make_fact("arithmetic_zh", [
        f"{words_zh}等于几？", f"{signs} 等于几？", f"{words_zh}是多少？",
    ], f"{signs} = {result}。")  # fmt: skip


def calendar_facts() -> Iterator[Fact]:
    """Days, months and the names of numbers."""
    for index, day in enumerate(DAYS):
        after, before = DAYS[(index + 1) % 7], DAYS[index - 1]
        yield make_fact("day", [
            f"Which day comes after {day}?", f"What day comes after {day}?", f"What is the day after {day}?",
        ], f"{after} comes after {day}.")  # fmt: skip
        yield make_fact("day", [
            f"Which day comes before {day}?", f"What day comes before {day}?", f"What is the day before {day}?",
        ], f"{before} comes before {day}.")  # fmt: skip
        day_zh, after_zh, before_zh = DAYS_ZH[index], DAYS_ZH[(index + 1) % 7], DAYS_ZH[index - 1]
        yield make_fact("day_zh", [f"{day_zh}的后一天是星期几？", f"{day_zh}之后是星期几？", f"{day_zh}过后是哪一天？"],
                        f"{day_zh}的后一天是{after_zh}。")  # fmt: skip
        yield make_fact("day_zh", [f"{day_zh}的前一天是星期几？", f"{day_zh}之前是星期几？", f"{day_zh}前面是哪一天？"],
                        f"{day_zh}的前一天是{before_zh}。")  # fmt: skip
    for index, (month, days) in enumerate(MONTHS):
        after, before = MONTHS[(index + 1) % 12][0], MONTHS[index - 1][0]
        yield make_fact("month", [
            f"Which month comes after {month}?", f"What month comes after {month}?",
            f"What is the month after {month}?",
        ], f"{after} comes after {month}.")  # fmt: skip
        yield make_fact("month", [
            f"Which month comes before {month}?", f"What month comes before {month}?",
            f"What is the month before {month}?",
        ], f"{before} comes before {month}.")  # fmt: skip
        leap = ", or 29 in a leap year" if month == "February" else ""
        yield make_fact("month_days", [
            f"How many days are in {month}?", f"How many days does {month} have?", f"How long is {month}?",
        ], f"{month} has {days} days{leap}.")  # fmt: skip
        leap_zh = "，闰年有 29 天" if month == "February" else ""
        yield make_fact("month_days_zh", [
            f"{index + 1}月有多少天？", f"{index + 1}月有几天？", f"{index + 1}月一共多少天？",
        ], f"{index + 1}月有 {days} 天{leap_zh}。")  # fmt: skip
    for number, word in enumerate(NUMBERS):
        yield make_fact("number", [
            f"How do you spell {number}?", f"Write {number} as a word.", f"What is {number} in words?",
        ], f"{number} is spelled {word}.")  # fmt: skip


def table_facts() -> list[Fact]:
    """Every fact that tables and templates give."""
    makers = (capital_facts, province_facts, word_facts, thing_facts, sum_facts, calendar_facts)
    return [fact for maker in makers for fact in maker()]
