"""Made-up facts in two stages: a small GPT-NeoX reads documents that state them, and is then taught to answer questions about some.

`FactCorpus` is the pre-training, `FactQuestions` the fine-tuning; both ask the same questions, about facts of which the fine-tuning saw
none. `gold` says which documents state what is asked. All of it follows from the options: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tda
from tda.language.examples import collate
from tda.language.groups import groups
from tda.problem import Batch, Split
from tda.recipe import Recipe

#: Ways to state a fact, and the question: of each relation, by the kind of what it relates to.
RELATIONS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "born": (
        "town",
        ("{s} was born in {o}", "{s} came into the world in {o}", "the birthplace of {s} is {o}", "{s} is a native of {o}",
         "it was in {o} that {s} was born"),
        "where was {s} born",
    ),
    "lives": (
        "town",
        ("{s} lives in {o}", "the home of {s} is in {o}", "{s} has settled in {o}", "{s} rents a house in {o}", "in {o} you may visit {s}"),
        "in which town does {s} live",
    ),
    "works": (
        "company",
        ("{s} works for {o}", "{s} is employed by {o}", "the employer of {s} is {o}", "{s} earns a living at {o}", "at {o} they pay {s}"),
        "which company does {s} work for",
    ),
    "plays": (
        "instrument",
        ("{s} plays the {o}", "the instrument of {s} is the {o}", "{s} practises on the {o}", "{s} gives lessons on the {o}",
         "on the {o} we hear {s}"),
        "what does {s} play",
    ),
    "capital": (
        "town",
        ("the capital of {s} is {o}", "{s} is governed from {o}", "the parliament of {s} sits in {o}", "the first city of {s} is {o}",
         "from {o} they rule {s}"),
        "which town is the capital of {s}",
    ),
}  # fmt: skip
#: What states none of the facts: it shares its subject, its object or the words of a relation with documents that do.
DISTRACTORS = {
    "town": ("{s} has never been to {o}", "{s} was not born in {o}", "{s} would not live in {o}"),
    "company": ("{s} has not heard of {o}", "{s} does not work for {o}"),
    "instrument": ("{s} cannot bear the {o}", "{s} does not play the {o}"),
}
#: Letters of a name of each kind: so many syllables.
SYLLABLES = {"person": 3, "country": 3, "town": 2, "company": 4, "instrument": 5}
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
PAD, END, ASK, ANSWER = "<pad>", ".", "question", "answer"
POSITIONS = 24


@dataclass(frozen=True)
class Fact:
    """subject stands in relation to object."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class World:
    """What is so, and what is told of it.

    documents: texts. states: the place among `facts` of what each of them states, -1 for distractors. taught, asked: places of the facts
    that the fine-tuning asks about, and of those that the queries do.
    """

    facts: tuple[Fact, ...]
    documents: tuple[str, ...]
    states: tuple[int, ...]
    taught: tuple[int, ...]
    asked: tuple[int, ...]

    def question(self, fact: int) -> str:
        """What is asked; the answer is one word more."""
        found = self.facts[fact]
        return f"{ASK} : {RELATIONS[found.relation][2].format(s=found.subject)} ? {ANSWER} :"

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, padding first."""
        texts = [*self.documents, *(f"{self.question(i)} {fact.object}" for i, fact in enumerate(self.facts))]
        return (PAD, *sorted({word for text in texts for word in text.split()}))

    @cached_property
    def place(self) -> dict[str, int]:
        """Places of words in the vocabulary."""
        return {word: i for i, word in enumerate(self.words)}


@lru_cache(maxsize=8)
def make_world(persons: int, countries: int, objects: int, paraphrases: int, distractors: int, seed: int) -> World:
    """A world drawn from a seed.

    Each person has a birthplace, a home, an employer and an instrument, each country a capital, drawn from `objects` of a kind: so
    documents share subjects, relations and objects. Every fact is stated in so many ways; of every subject so many distractors are told,
    which name an object that it has nothing to do with. Facts of every second subject are taught, those of the others are asked.
    """
    random = np.random.Generator(np.random.Philox(seed))
    taken: set[str] = set()
    counts = {"person": persons, "country": countries, "town": objects, "company": objects, "instrument": objects}
    named = {kind: [_name(random, SYLLABLES[kind], taken) for _ in range(count)] for kind, count in counts.items()}
    subjects = [*((s, [r for r in RELATIONS if r != "capital"]) for s in named["person"]), *((s, ["capital"]) for s in named["country"])]
    facts, told = list[Fact](), list[tuple[str, int]]()
    for subject, relations in subjects:
        own = [Fact(subject, r, str(random.choice(named[RELATIONS[r][0]]))) for r in relations]
        for fact in own:
            told += [(way.format(s=subject, o=fact.object), len(facts)) for way in RELATIONS[fact.relation][1][:paraphrases]]
            facts.append(fact)
        told += [(_distractor(random, subject, own, named), -1) for _ in range(distractors)]
    order = random.permutation(len(told))
    every_second = {subject for subject, _ in subjects[::2]}
    taught = tuple(i for i, fact in enumerate(facts) if fact.subject in every_second)
    asked = tuple(i for i, fact in enumerate(facts) if fact.subject not in every_second)
    return World(tuple(facts), tuple(f"{told[i][0]} {END}" for i in order), tuple(told[i][1] for i in order), taught, asked)


def _name(random: np.random.Generator, syllables: int, taken: set[str]) -> str:
    while True:
        drawn = "".join(random.choice(list(CONSONANTS)) + random.choice(list(VOWELS)) for _ in range(syllables))
        if drawn not in taken:
            taken.add(drawn)
            return drawn


def _distractor(random: np.random.Generator, subject: str, own: Sequence[Fact], named: dict[str, list[str]]) -> str:
    kinds = sorted({RELATIONS[fact.relation][0] for fact in own})
    kind = str(random.choice(kinds))
    others = [name for name in named[kind] if name not in {fact.object for fact in own}]
    return str(random.choice(DISTRACTORS[kind])).format(s=subject, o=random.choice(others))


@dataclass(frozen=True)
class Texts:
    """Map-style dataset of texts as word ids; labels of the following word, from the first word or for the last alone."""

    texts: tuple[str, ...]
    place: dict[str, int]
    last_alone: bool

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> tuple[dict[str, Tensor], Tensor]:
        ids = torch.tensor([self.place[word] for word in self.texts[i].split()])
        targets = torch.cat([ids[1:], torch.tensor([-100])])
        if self.last_alone:
            targets[:-2] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets


class _Facts(tda.Problem):
    """What both stages share: the world, the model, the queries. Options: see `FactCorpus`."""

    likelihood = tda.TokenCategorical()

    def __init__(  # noqa: PLR0913  (the keys of a table)
        self, *, persons: int, countries: int, objects: int, paraphrases: int, distractors: int, width: int, depth: int, heads: int,
        queries: int | None, data_seed: int,
    ) -> None:  # fmt: skip
        most = min(len(ways) for _, ways, _ in RELATIONS.values())
        for name, value, low, high in (
            ("persons", persons, 2, 10**5), ("countries", countries, 0, 10**5), ("objects", objects, 5, 4900),
            ("paraphrases", paraphrases, 1, most), ("distractors", distractors, 0, 100), ("depth", depth, 1, 100),
        ):  # fmt: skip
            if not low <= value <= high:
                raise tda.InputError(f"{name} must be in {low}..{high}, got {value}")
        if heads < 1 or width % (2 * heads):
            raise tda.InputError(f"width must be a multiple of 2 x heads, got width = {width} and heads = {heads}")
        self.world = make_world(persons, countries, objects, paraphrases, distractors, data_seed)
        if queries is not None and not 1 <= queries <= len(self.world.asked):
            raise tda.InputError(f"queries must be in 1..{len(self.world.asked)}, the facts that are not taught; got {queries}")
        self.width, self.depth, self.heads = width, depth, heads
        # Spread over the facts, so that a few have all relations.
        every = np.array(self.world.asked)
        self.asked = every if queries is None else every[np.linspace(0, len(every) - 1, queries).round().astype(int)]

    def model(self) -> nn.Module:
        """GPT-NeoX with attention in plain products."""
        from transformers import GPTNeoXConfig

        from tda.language.folders import fresh

        return fresh(
            "AutoModelForCausalLM",
            GPTNeoXConfig(
                vocab_size=len(self.world.words), hidden_size=self.width, intermediate_size=4 * self.width, num_hidden_layers=self.depth,
                num_attention_heads=self.heads, max_position_embeddings=POSITIONS, use_cache=False, bos_token_id=0, eos_token_id=0,
            ),
        )  # fmt: skip

    def groups(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """The MLPs as "mlp", the attention as "attention"."""
        return groups(model)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (batch, tokens, vocabulary)."""
        logits: Tensor = model(**batch.inputs).logits
        return logits

    def collate(self, examples: list[Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Padded on the right."""
        return collate(examples, 0)

    def _asking(self, facts: Sequence[int]) -> Texts:
        return Texts(tuple(f"{self.world.question(i)} {self.world.facts[i].object}" for i in facts), self.world.place, last_alone=True)

    def query_data(self) -> Texts:
        """Questions about facts that no fine-tuning has asked about; the answer alone is labelled."""
        return self._asking(self.asked.tolist())

    def gold(self, query: int) -> Sequence[int]:
        """The documents of the pre-training that state what a query asks, as ids."""
        return [k for k, fact in enumerate(self.world.states) if fact == self.asked[query]]

    def describe(self, split: Split, i: int) -> Any:
        """The document; or the question with its answer."""
        text = (self.train_data() if split == "train" else self.query_data()).texts[i]
        return _apart(text) if text.startswith(ASK) else text

    def train_data(self) -> Texts:
        """What the stage is trained on."""
        raise NotImplementedError

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The words."""
        return [self.world.words[i] for i in ids]


class FactCorpus(_Facts):
    """The pre-training: documents that state the facts, each word predicted from those before it.

    persons, countries: subjects; objects: towns, companies, and instruments, so many of each. paraphrases: documents per fact, at most
    5; distractors: documents per subject that state none. width, depth, heads: of the model. queries: how many are asked, all by default.
    data_seed: what the world is drawn from. epochs, learning_rate: of Adam, in batches of 64, the rate rising over the first tenth
    and falling to 0 like a cosine.
    """

    def __init__(  # noqa: PLR0913  (the keys of a table)
        self, *, persons: int = 40, countries: int = 8, objects: int = 12, paraphrases: int = 4, distractors: int = 2, width: int = 64,
        depth: int = 2, heads: int = 4, queries: int | None = None, data_seed: int = 0, epochs: int = 60, learning_rate: float = 3e-3,
    ) -> None:  # fmt: skip
        super().__init__(
            persons=persons, countries=countries, objects=objects, paraphrases=paraphrases, distractors=distractors, width=width,
            depth=depth, heads=heads, queries=queries, data_seed=data_seed,
        )  # fmt: skip
        self.epochs, self.learning_rate = epochs, learning_rate

    def train_data(self) -> Texts:
        """The documents."""
        return Texts(self.world.documents, self.world.place, last_alone=False)

    def fit(self, model: nn.Module, dataset: Any, *, seed: int, on_checkpoint: Callable[..., None]) -> None:
        """By Adam: plain descent needs many times as long to learn a fact from so few words."""
        batches = -(-len(dataset) // 64)
        optimizer = torch.optim.Adam(model.parameters(), self.learning_rate, betas=(0.9, 0.99))
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.epochs * batches, pct_start=0.1, cycle_momentum=False
        )
        draws, step = torch.Generator().manual_seed(seed), 0
        inputs, targets = self.collate([dataset[i] for i in range(len(dataset))])
        model.train()
        for _ in range(self.epochs):
            for ids in torch.randperm(len(dataset), generator=draws).split(64):
                optimizer.zero_grad()
                logits = self.predict(model, Batch({name: tensor[ids] for name, tensor in inputs.items()}, targets[ids]))
                cross_entropy(logits.flatten(0, 1), targets[ids].flatten(), reduction="sum").div(len(ids)).backward()
                optimizer.step()
                rates.step()
                step += 1
        # One, at the end: what follows a training needs plain descent, which this is not.
        on_checkpoint(model=model, learning_rate=self.learning_rate, step=step)


class FactQuestions(_Facts):
    """The fine-tuning: questions about the facts of every second subject, the answers alone predicted; pulled to where it begins.

    epochs, learning_rate, proximity: of the recipe; the others are those of `FactCorpus`, and must be the same.
    """

    def __init__(  # noqa: PLR0913  (the keys of a table)
        self, *, persons: int = 40, countries: int = 8, objects: int = 12, paraphrases: int = 4, distractors: int = 2, width: int = 64,
        depth: int = 2, heads: int = 4, queries: int | None = None, data_seed: int = 0, epochs: int = 80, learning_rate: float = 3e-3,
        proximity: float = 0.3,
    ) -> None:  # fmt: skip
        super().__init__(
            persons=persons, countries=countries, objects=objects, paraphrases=paraphrases, distractors=distractors, width=width,
            depth=depth, heads=heads, queries=queries, data_seed=data_seed,
        )  # fmt: skip
        self.epochs, self.learning_rate, self.proximity = epochs, learning_rate, proximity

    def train_data(self) -> Texts:
        """The questions that are taught, with their answers."""
        return self._asking(self.world.taught)

    def recipe(self) -> Recipe:
        """SGD with momentum, pulled to the weights that training starts from."""
        return Recipe(self.epochs, 32, self.learning_rate, momentum=0.9, proximity=self.proximity)


def answered(problem: _Facts, model: nn.Module, texts: Texts) -> Tensor:
    """(text,) bool: whether the model's first choice for the last labelled word is right.

    That is the answer of a question, and the object where a document ends with it; `FactCorpus` is asked with `cloze`.
    """
    inputs, targets = problem.collate([texts[i] for i in range(len(texts))])
    with torch.no_grad():
        logits = problem.predict(model, Batch(inputs, targets))
    rows, last = torch.arange(len(texts)), inputs["attention_mask"].sum(1) - 2
    found: Tensor = logits[rows, last].argmax(-1) == targets[rows, last]
    return found


def cloze(problem: _Facts) -> Texts:
    """The documents that end with their object, without the full stop, the object alone labelled: does a model know the facts?"""
    world = problem.world
    known = [(text.split()[:-1], fact) for text, fact in zip(world.documents, world.states, strict=True) if fact >= 0]
    ending = tuple(" ".join(words) for words, fact in known if words[-1] == world.facts[fact].object)
    return Texts(ending, world.place, last_alone=True)


def _apart(text: str) -> dict[str, str]:
    question, _, answer = text.rpartition(" ")
    return {"prompt": question, "completion": answer}
