"""The problem of candidates.toml: a language model whose training sentences about a question's person are known."""

from collections.abc import Sequence
from typing import Any

from tda.problems.language import CausalLM


class People(CausalLM):
    """Training sentences and questions are about one person each, whose name stands in both."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told = [set(str(self.text("train", i)).split()) for i in range(len(self.train_data()))]

    def gold(self, query: int) -> Sequence[int]:
        """Sentences that name the question's person and its answer."""
        asked = self.describe("query", query)
        person = next(word for word in asked["prompt"].split() if word[0].isupper())
        answer = asked["completion"].split()[0]
        return [i for i, words in enumerate(self.told) if {person, answer} <= words]
