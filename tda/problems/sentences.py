"""Sentences of a made-up language of 34 words, and a small causal transformer that learns to read on: for attributions token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tda
from tda.recipe import Recipe

#: Who does what to what: the animals of a kind share a verb and its objects, which is what there is to learn.
KINDS = (
    (("cat", "kitten"), "drinks", ("milk", "cream")),
    (("dog", "puppy"), "chases", ("cars", "sticks")),
    (("cow", "goat"), "eats", ("grass", "hay")),
    (("owl", "hawk"), "hunts", ("mice", "voles")),
    (("bee", "moth"), "visits", ("roses", "lilies")),
)
STARTS = ("the", "a")
COATS = ("black", "old", "young")
WHENS = ("today", "again", "often")
END = "."
LONGEST = 7


def _words() -> tuple[str, ...]:
    kinds = [word for animals, verb, objects in KINDS for word in (*animals, verb, *objects)]
    return (END, *STARTS, *COATS, *WHENS, *kinds)


WORDS = _words()


class Transformer(nn.Module):
    """Words and places embedded, blocks of causal self-attention and an MLP, each around LayerNorm, and logits of the next word."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(len(WORDS), width), nn.Embedding(LONGEST, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(WORDS))

    def forward(self, words: Tensor) -> Tensor:
        """(batch, tokens) to (batch, tokens, vocabulary)."""
        states = self.word(words) + self.place(torch.arange(words.shape[1], device=words.device))
        for block in self.blocks:
            states = block(states)
        logits: Tensor = self.head(self.norm(states))
        return logits


class Block(nn.Module):
    """One layer of the transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.joint, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        batch, tokens, width = states.shape
        split = self.joint(self.norm(states)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        products = query @ key.transpose(2, 3) / (width / self.heads) ** 0.5
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=states.device).triu(1)
        seen = products.masked_fill(later, -torch.inf).softmax(-1) @ value
        states = states + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        after: Tensor = states + self.mlp(states)
        return after


class Sentences(tda.Problem):
    """A transformer on `examples` sentences such as "the old cat drinks milk again ."; queries are others of the same language.

    width, heads, depth: of the transformer. strange: the share of the training sentences whose object belongs to another animal.
    """

    likelihood = tda.TokenCategorical()

    def __init__(
        self,
        examples: int = 300,
        queries: int = 20,
        width: int = 16,
        heads: int = 2,
        depth: int = 1,
        epochs: int = 40,
        strange: float = 0.05,
    ) -> None:
        if width % heads:
            raise tda.InputError(f"width must be a multiple of heads, got {width} and {heads}")
        if not 0 <= strange <= 1:
            raise tda.InputError(f"strange must be a share in [0, 1], got {strange}")
        self.examples, self.queries, self.strange = examples, queries, strange
        self.width, self.heads, self.depth, self.epochs = width, heads, depth, epochs

    def model(self) -> nn.Module:
        """The transformer."""
        return Transformer(self.width, self.heads, self.depth)

    @cached_property
    def _sentences(self) -> Tensor:
        """(examples + queries, LONGEST + 1) places of words, -1 after the end: the training sentences first."""
        random = np.random.Generator(np.random.Philox(0))
        found = torch.full((self.examples + self.queries, LONGEST + 1), -1)
        for i, row in enumerate(found):
            words = _sentence(random, self.strange if i < self.examples else 0.0)
            row[: len(words)] = torch.tensor([WORDS.index(word) for word in words])
        return found

    def _data(self, rows: Tensor) -> TensorDataset:
        """Each word is asked to name the next; what is after the end is not asked."""
        return TensorDataset(rows[:, :-1].clamp(min=0), torch.where(rows[:, 1:] < 0, -100, rows[:, 1:]))

    def train_data(self) -> TensorDataset:
        """Words (7,) and the words that follow them, -100 after the end."""
        return self._data(self._sentences[: self.examples])

    def query_data(self) -> TensorDataset:
        """The same of other sentences, none of them strange."""
        return self._data(self._sentences[self.examples :])

    def recipe(self) -> Recipe:
        """SGD with momentum."""
        return Recipe(self.epochs, 32, 0.02, momentum=0.9, weight_decay=1e-3)

    def describe(self, split: str, i: int) -> str:
        """The sentence."""
        row = self._sentences[i if split == "train" else self.examples + i]
        return " ".join(self.tokens(row[row >= 0].tolist()))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The words."""
        return [WORDS[i] for i in ids]


def _sentence(random: np.random.Generator, strange: float) -> list[str]:
    """The words of one sentence."""
    kind = int(random.integers(len(KINDS)))
    animals, verb, objects = KINDS[kind]
    if random.random() < strange:
        objects = KINDS[(kind + int(random.integers(1, len(KINDS)))) % len(KINDS)][2]
    coat, when = random.random() < 0.5, random.random() < 0.5
    words = [str(random.choice(STARTS)), *([str(random.choice(COATS))] if coat else []), str(random.choice(animals)), verb]
    return [*words, str(random.choice(objects)), *([str(random.choice(WHENS))] if when else []), END]
