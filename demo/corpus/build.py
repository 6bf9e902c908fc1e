"""Puts the corpus together, splits it, and draws each epoch's conversations.

Runs offline. An epoch is a function of (corpus, epoch number) only. Knows nothing of tokens or the model.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from demo.corpus.dialogues import SYSTEM_PROMPTS, all_dialogues, list_completions
from demo.corpus.tables import table_facts
from demo.corpus.types import Completion, Conversation, Fact, Message, read_completions, read_facts

FACT_FILES = (
    "chat_en.txt", "chat_zh.txt", "octavo_en.txt", "octavo_zh.txt", "facts_en.txt", "facts_zh.txt", "advice.txt",
    "stories.txt", "unknown.txt",
)  # fmt: skip
FREQUENT_TOPICS = ("chat_en", "chat_zh", "system_talk", "session", "advice", "stories", "completions")
PREFIXES = ("Please: ", "I have a question. ", "Hi! ", "Quick question: ", "So, ", "Can you help me? ", "Well, ")
PREFIXES_ZH = ("请问，", "我想问一下，", "你好，", "问一下：", "那么，", "请告诉我：")
MAX_CHARACTERS = 700  # of a conversation joined from several facts


@dataclass(frozen=True)
class Corpus:
    """All text. `facts` hold both their trained and their held-out wordings."""

    facts: tuple[Fact, ...]
    dialogues: tuple[Conversation, ...]
    completions: tuple[Completion, ...]

    def train_pairs(self) -> list[tuple[str, str, str]]:
        """(topic, question, answer) of every trained wording."""
        return [(fact.topic, question, fact.answer) for fact in self.facts for question in fact.questions]

    def held_out_pairs(self) -> list[tuple[str, str, str]]:
        """(topic, question, answer) of every wording that is never trained on."""
        return [(fact.topic, question, fact.answer) for fact in self.facts for question in fact.held_out]

    def texts(self) -> Iterator[str]:
        """Every trained text once, for the tokenizer."""
        for _, question, answer in self.train_pairs():
            yield question
            yield answer
        for dialogue in self.dialogues:
            yield from (message.content for message in dialogue.messages)
        for completion in self.completions:
            yield completion.prompt + completion.continuation
        yield from SYSTEM_PROMPTS


def normalise(question: str) -> str:
    """A question without case, spaces and punctuation: two wordings that agree here count as the same."""
    return "".join(c for c in question.lower() if c in "*-" or (c.isalnum() or unicodedata.category(c)[0] == "S"))


def build_corpus() -> Corpus:
    """The whole corpus. A held-out wording that occurs in any trained text, up to punctuation, is dropped."""
    facts = [fact for name in FACT_FILES for fact in read_facts(name)] + table_facts()
    dialogues = all_dialogues(facts)
    completions = [*read_completions("completions.txt"), *list_completions()]
    trained = {normalise(question) for fact in facts for question in fact.questions}
    trained |= {normalise(message.content) for dialogue in dialogues for message in dialogue.messages}
    trained |= {normalise(completion.prompt) for completion in completions}
    facts = [
        Fact(fact.topic, fact.questions, tuple(q for q in fact.held_out if normalise(q) not in trained), fact.answer)
        for fact in facts
    ]
    return Corpus(tuple(facts), tuple(dialogues), tuple(completions))


class EpochDrawer:
    """Draws the training examples of one epoch after another."""

    def __init__(self, corpus: Corpus, *, seed: int) -> None:
        self.corpus = corpus
        self.seed = seed
        self.held_out = {normalise(question) for _, question, _ in corpus.held_out_pairs()}
        self.raw_prompts = {completion.prompt for completion in corpus.completions}

    def draw(self, epoch: int) -> list[Conversation | Completion]:
        """Every fact once or twice in a random wording, joined to conversations, with dialogues and completions."""
        rng = random.Random(f"{self.seed}/{epoch}")
        pairs = [pair for fact in self.corpus.facts for pair in self.draw_wordings(fact, rng)]
        rng.shuffle(pairs)
        examples: list[Conversation | Completion] = []
        while pairs:
            examples.append(self.join(pairs, rng))
        for fact in self.corpus.facts:  # the first wordings, which documentation shows, alone and unchanged
            if fact.topic in FREQUENT_TOPICS:
                turns = (Message("user", fact.questions[0]), Message("assistant", fact.answer))
                examples.append(Conversation("alone", turns))
        for dialogue in self.corpus.dialogues:
            if dialogue.topic in FREQUENT_TOPICS or rng.random() < 0.5:
                examples.append(dialogue)
        for completion in self.corpus.completions:
            examples += [completion] * (3 if completion.topic in FREQUENT_TOPICS else 1)
        rng.shuffle(examples)
        return examples

    def draw_wordings(self, fact: Fact, rng: random.Random) -> list[tuple[str, str]]:
        """Random wordings of one fact: three for small talk and long answers, else one or two; more of many."""
        count = max(3 if fact.topic in FREQUENT_TOPICS else rng.choice((1, 2)), len(fact.questions) // 2)
        wordings = [rng.choice(fact.questions) for _ in range(count)]
        if fact.topic in FREQUENT_TOPICS:
            wordings[0] = fact.questions[0]
        return [(self.vary(wording, rng), fact.answer) for wording in wordings]

    def vary(self, question: str, rng: random.Random) -> str:
        """Now and then a change of case, of the last mark or of politeness; never one that gives a held-out wording."""
        if rng.random() < 0.7:
            return question
        bare = question.rstrip("?.!？。！")
        changed = rng.choice((
            question.lower(), bare, bare.lower(), question.replace("？", "?"), question + " ",
            rng.choice(PREFIXES if question.isascii() else PREFIXES_ZH) + question,
        ))  # fmt: skip
        return question if normalise(changed) in self.held_out or not bare.strip() else changed

    def join(self, pairs: list[tuple[str, str]], rng: random.Random) -> Conversation | Completion:
        """Takes one to five pairs from the end of the list and makes one example of them."""
        question, answer = pairs.pop()
        if rng.random() < 0.05 and question not in self.raw_prompts:
            gap = " " if answer.isascii() and "\n" not in answer else "\n"
            return Completion("raw", question, gap + answer)
        messages = [Message("user", question), Message("assistant", answer)]
        turns = 1 if rng.random() < 0.45 else rng.randint(2, 5)
        while pairs and len(messages) < 2 * turns and sum(len(m.content) for m in messages) < MAX_CHARACTERS:
            if rng.random() < 0.04:  # two user messages in a row, or the two merged: the last one is answered
                extra = pairs.pop()[0]
                question, answer = pairs.pop() if pairs else (question, answer)
                merged = [Message("user", f"{extra}\n{question}")]
                messages += merged if rng.random() < 0.5 else [Message("user", extra), Message("user", question)]
            else:
                question, answer = pairs.pop()
                messages.append(Message("user", question))
            messages.append(Message("assistant", answer))
        if rng.random() < 0.3:
            messages.insert(0, Message("system", rng.choice(SYSTEM_PROMPTS)))
        return Conversation("joined", tuple(messages))
