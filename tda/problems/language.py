"""Language models of transformers: any local folder with config.json, and text or token ids in files. See docs/language.md."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import tda
from tda import checkpoint as checkpoints
from tda.language import adapters, folders, groups
from tda.language.documents import Documents, Fields, open_documents
from tda.language.examples import Inputs, Sequences, collate, pack
from tda.language.gold import gold_of
from tda.measurements import sequence_log_odds
from tda.problem import Batch, Split
from tda.recipe import Recipe

#: A limit for models that have none.
UNLIMITED = 2**31


class _Language(tda.Problem):
    """What causal models and classifiers have in common: folders, documents, training."""

    paths = ("checkpoint", "tokenizer", "adapter", "train", "query")
    kind: ClassVar[str]

    def __init__(  # noqa: PLR0913  (the keys of a table)
        self,
        checkpoint: str,
        train: str,
        query: str,
        *,
        tokenizer: str,
        adapter: str,
        fields: Fields,
        max_length: int | None,
        truncate: bool,
        end: bool,
        packing: bool,
        epochs: int,
        training: Mapping[str, Any],
    ) -> None:
        if max_length is not None and max_length < 2:
            raise tda.InputError(f"max_length must be at least 2 tokens, got {max_length}")
        if epochs < 0:
            raise tda.InputError(f"epochs must be at least 0, got {epochs}; 0: the weights are those of the run's checkpoint")
        self.folder = folders.local(checkpoint, "checkpoint")
        self.adapter = folders.local(adapter, "adapter") if adapter else None
        self._words = folders.local(tokenizer, "tokenizer") if tokenizer else None
        self._urls: dict[Split, str] = {"train": train, "query": query}
        self._fields, self._end, self._truncate, self._packing = fields, end, truncate, packing
        self._recipe = Recipe(epochs, **training) if epochs else None
        self.config = folders.read_config(self.folder)
        self.limit = self._limit(max_length)

    def _limit(self, asked: int | None) -> int:
        most = folders.positions(self.config)
        if asked is not None and most is not None and asked > most:
            raise tda.InputError(f"max_length = {asked} is more than the {most} positions of {self.folder}; set it to {most} or less")
        if self._packing and asked is None and most is None:
            raise tda.InputError("packing needs max_length: the model has no limit of its own")
        return asked or most or UNLIMITED

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers; None where there is none."""
        folder = self._words or (self.folder if folders.has_tokenizer(self.folder) else None)
        if folder is None:
            return None
        found = folders.read_tokenizer(folder)
        folders.check_vocabulary(found, self.config, folder)
        return found

    def model(self) -> nn.Module:
        """The architecture of the folder: with its weights where the run trains on, else drawn; and the adapter."""
        model = self._starting_weights() if self._recipe else folders.fresh(self.kind, self.config)
        self._prepare(model)
        return adapters.add_adapter(model, self.adapter) if self.adapter else model

    def _starting_weights(self) -> nn.Module:
        if not checkpoints.has_weights([path.name for path in self.folder.iterdir()]):
            return folders.fresh(self.kind, self.config)
        return folders.filled(self.kind, self.config, checkpoints.read(f"file://{self.folder}"), str(self.folder), may_lack=None)

    def _prepare(self, model: nn.Module) -> None:
        """Settings and checks of a new base model."""

    def restore(self, model: nn.Module, state: dict[str, Tensor], where: str) -> None:
        """Weights by the model's own names, or those of a transformers folder (of the base, where there is an adapter)."""
        if state.keys() <= model.state_dict().keys():
            checkpoints.fill(model, state, where)
            return
        if adapters.is_adapter(state):
            raise tda.InputError(
                f"checkpoint {where} is a PEFT adapter without its base; give the base here and this as problem_options.adapter"
            )
        lacks = adapters.replaced_names(model) if self.adapter else frozenset()
        base = folders.filled(self.kind, self.config, state, where, lacks).state_dict()
        names = adapters.base_names(model, base) if self.adapter else {name: name for name in base}
        model.load_state_dict({names[name]: tensor for name, tensor in base.items()}, strict=False)

    def groups(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        """The MLPs as "mlp", the attention as "attention"."""
        return {part: names for part, names in groups.groups(model).items() if names}

    @classmethod
    def content(cls, options: Mapping[str, Any]) -> str:
        """A digest of configuration, tokenizer and adapter, and of the weights where they are trained on."""
        total = hashlib.sha256()
        for option in ("checkpoint", "tokenizer", "adapter"):
            if options.get(option):
                whole = option == "adapter" or bool(options.get("epochs"))
                for file in _files(folders.local(options[option], option), weights=whole):
                    total.update(f"{option}/{file.name}".encode() + hashlib.sha256(file.read_bytes()).digest())
        return total.hexdigest()

    def recipe(self) -> Recipe | None:
        """SGD with momentum, where `epochs` are asked for."""
        return self._recipe

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits."""
        logits: Tensor = model(**batch.inputs).logits
        return logits

    def collate(self, examples: list[Any]) -> tuple[Inputs, Tensor]:
        """Padded on the right, to the longest of the batch."""
        return collate(examples, self.pad or 0)

    @cached_property
    def pad(self) -> int | None:
        """What sequences are padded with: the model's padding token, the tokenizer's, or the end of text; None where there is none."""
        tokenizer, config = self.tokenizer, self.config
        ends = config.eos_token_id if isinstance(config.eos_token_id, int) else None
        given = [config.pad_token_id, getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None), ends]
        return next((pad for pad in given if pad is not None and 0 <= pad < folders.vocabulary(config)), None)

    @property
    @abstractmethod
    def _classes(self) -> Mapping[str, int] | None:
        """Numbers of class names; None where tokens are the labels."""

    def _documents(self, split: Split) -> Documents:
        # Token ids alone need no tokenizer, and none is read that does not fit: the reader asks for one where it meets text.
        return open_documents(self._urls[split], split, fields=self._fields, tokenizer=self.tokenizer, end=self._end, classes=self._classes)

    @cached_property
    def _train(self) -> Sequences:
        documents = self._documents("train")
        documents = pack(documents, self.limit) if self._packing else documents
        return Sequences(documents, "train", self.limit, folders.vocabulary(self.config), self._truncate, packed=self._packing)

    @cached_property
    def _query(self) -> Sequences:
        found = Sequences(self._documents("query"), "query", self.limit, folders.vocabulary(self.config), self._truncate)
        if silent := found.unlabelled():
            name = found.documents.name("query", silent[0])
            raise tda.InputError(f"{name} has no labelled token, so nothing is asked: give it a completion, or a longer max_length")
        return found

    def train_data(self) -> Sequences:
        """dataset[i] -> ({"input_ids", "attention_mask"}, targets)."""
        return self._train

    def query_data(self) -> Sequences:
        """The same; one document each, packing or not."""
        return self._query

    def lengths(self, split: Split) -> Sequence[int]:
        """Tokens of each example."""
        found: Sequence[int] = (self._train if split == "train" else self._query).lengths()
        return found

    def notes(self) -> Sequence[str]:
        """Training examples without a labelled token: all their scores are 0."""
        silent = self._train.unlabelled()
        if not silent:
            return ()
        some = checkpoints.listed([str(i) for i in silent])
        return (f"{len(silent)} training examples have no labelled token, so their scores are 0: {some}",)

    def describe(self, split: Split, i: int) -> Any:
        """The text; of a prompt and a completion, both."""
        inputs, targets = (self._train if split == "train" else self._query)[i]
        ids = inputs["input_ids"]
        first = int((targets != -100).nonzero()[0]) + 1 if targets.ndim and bool((targets != -100).any()) else 0
        if first > 1:
            return {"prompt": self._text(ids[:first]), "completion": self._text(ids[first:])}
        return self._text(ids)

    def text(self, split: Split, i: int) -> str | None:
        """The text, of a prompt and a completion both, without special tokens; None where there is no tokenizer."""
        inputs, _ = (self._train if split == "train" else self._query)[i]
        return None if self.tokenizer is None else str(self.tokenizer.decode(inputs["input_ids"].tolist(), skip_special_tokens=True))

    def gold(self, query: int) -> Sequence[int] | None:
        """The ids in the field `gold` of a query's record; None where no record has it."""
        return None if self._gold is None else self._gold[query]

    @cached_property
    def _gold(self) -> list[list[int]] | None:
        return gold_of(self._urls["query"])

    def _text(self, ids: Tensor) -> str:
        if self.tokenizer is None:
            return " ".join(str(i) for i in ids.tolist())
        return str(self.tokenizer.decode(ids.tolist()))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokenizer's names of tokens; their numbers where there is no tokenizer."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(ids))]


class CausalLM(_Language):
    """A causal language model on documents: each token is asked to name the next.

    checkpoint: a folder with config.json. tokenizer: a folder; by default the same. adapter: a PEFT adapter's folder; then its parameters
    alone are attributed. train, query: *.jsonl, *.parquet, a folder of the `datasets` library, or a *.zarr group. text, prompt, completion:
    names of fields; where a record has a completion, its prompt is given and not predicted. max_length: the most tokens of an
    example, at most the model's positions, which are the default. truncate: whether longer ones are cut, or refused. packing:
    training documents one after the other, cut every max_length tokens. end: whether the end-of-text token follows each document.
    measurement: "loss", or "log_odds" of all labelled tokens together. epochs: 0, and the weights are the run's `checkpoint`; more, and the
    run trains from the folder's weights, or from random ones where it has none, by SGD with the other options.

    Raises InputError where options, folders, tokenizer and data do not go together.
    """

    likelihood = tda.TokenCategorical()
    kind = "AutoModelForCausalLM"
    _classes = None

    def __init__(  # noqa: PLR0913  (the keys of a table)
        self,
        checkpoint: str,
        train: str,
        query: str,
        *,
        tokenizer: str = "",
        adapter: str = "",
        text: str = "text",
        prompt: str = "prompt",
        completion: str = "completion",
        max_length: int | None = None,
        truncate: bool = False,
        packing: bool = False,
        end: bool = False,
        measurement: Literal["loss", "log_odds"] = "loss",
        epochs: int = 0,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if measurement not in ("loss", "log_odds"):
            raise tda.InputError(f'measurement must be "loss" or "log_odds", got {measurement!r}')
        super().__init__(
            checkpoint, train, query, tokenizer=tokenizer, adapter=adapter, fields=Fields(text, prompt, completion), max_length=max_length,
            truncate=truncate, end=end, packing=packing, epochs=epochs,
            training={"batch_size": batch_size, "learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay},
        )  # fmt: skip
        self._causal = False
        if measurement == "log_odds":
            self.better = "higher"
            self.measurement = sequence_log_odds  # type: ignore[method-assign]

    def _prepare(self, model: nn.Module) -> None:
        """Raise InputError where the model sees the token that it is to predict, as BERT does."""
        if self._causal:
            return
        with torch.no_grad():
            first = [model(input_ids=torch.tensor([[1, last]])).logits[0, 0] for last in (0, 1)]
        if not torch.equal(*first):
            raise tda.InputError(f"checkpoint {self.folder} is a {self.config.model_type} that looks ahead: it is no causal language model")
        self._causal = True


class SequenceClassification(_Language):
    """A transformer that puts documents into classes.

    label: the field of the class, by its number or by its name in the model's config.json. measurement: "loss", or "margin", the
    log-odds of the right class. The other options are those of `CausalLM`; training on from a folder without a
    classifier begins with one drawn from the run's seed.

    Raises InputError where options, folders, tokenizer and data do not go together.
    """

    likelihood = tda.Categorical()
    kind = "AutoModelForSequenceClassification"

    def __init__(  # noqa: PLR0913  (the keys of a table)
        self,
        checkpoint: str,
        train: str,
        query: str,
        *,
        tokenizer: str = "",
        adapter: str = "",
        text: str = "text",
        label: str = "label",
        max_length: int | None = None,
        truncate: bool = False,
        measurement: Literal["loss", "margin"] = "loss",
        epochs: int = 0,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if measurement not in ("loss", "margin"):
            raise tda.InputError(f'measurement must be "loss" or "margin", got {measurement!r}')
        super().__init__(
            checkpoint, train, query, tokenizer=tokenizer, adapter=adapter, fields=Fields(text, label=label), max_length=max_length,
            truncate=truncate, end=False, packing=False, epochs=epochs,
            training={"batch_size": batch_size, "learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay},
        )  # fmt: skip
        if self.config.num_labels < 2:
            raise tda.InputError(f"checkpoint {self.folder} has num_labels = {self.config.num_labels}; classification needs two or more")
        if measurement == "margin":
            self.better = "higher"
            self.measurement = tda.margin  # type: ignore[method-assign]

    @property
    def _classes(self) -> Mapping[str, int]:
        return {str(self.config.id2label[i]): i for i in range(self.config.num_labels)}

    def _prepare(self, model: nn.Module) -> None:
        """A decoder classifies at the last token that is no padding: it has to know which that is."""
        if self.pad is None:
            raise tda.InputError(f"checkpoint {self.folder} has no padding and no end-of-text token; set pad_token_id in its config.json")
        config: Any = model.config
        config.pad_token_id = self.pad  # not before the model is made: its embedding would leave that token out


def _files(folder: Path, *, weights: bool) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and (weights or path.suffix != ".safetensors"))
