"""The demo model's text: sentences written for this project, and the templates that multiply them.

`build_corpus()` is deterministic: the same files give the same training and held-out parts on any machine.
"""

from __future__ import annotations

from demo.corpus.build import Corpus, build_corpus
from demo.corpus.types import Completion, Conversation, Fact, Message

__all__ = ["Completion", "Conversation", "Corpus", "Fact", "Message", "build_corpus"]
