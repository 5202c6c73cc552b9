"""What a task computes on: a problem at a checkpoint, named by strings, opened once per worker process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from tda import checkpoint
from tda.attributed import Attributed
from tda.data import Batching, Budget, length, lengths_of
from tda.device import device_here, ready
from tda.errors import InputError
from tda.loss_scale import SCALE
from tda.modules import inspect
from tda.problem import Problem, Split, load_problem, problem_digest

#: Checkpoints that a worker keeps open: methods that unroll the training score against several in one shard, those of three such
#: methods with their defaults among them.
OPEN_AT_ONCE = 16
SHORTER = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Subject:
    """A problem (`options` is JSON), its checkpoint's URL ("" for the weights that its model starts with), and which modules.

    autocast: what layers are computed in, "" for the dtype; scale: of losses, where that is float16. recompute: whether activations are
    checkpointed. device: as a run names it ("auto", "cuda"), which in this process may mean another than elsewhere. weights, source and
    inputs are digests of the checkpoint, of the problem and of both with the data, as they were when the run was planned, "" before. They
    keep what a long-lived process has opened apart from what lies at the same place later.
    """

    problem: str
    options: str
    checkpoint: str
    modules: tuple[str, ...]
    exclude: tuple[str, ...]
    dtype: str
    weights: str = ""
    source: str = ""
    inputs: str = ""
    autocast: str = ""
    recompute: bool = False
    device: str = "cpu"
    scale: float = SCALE

    @property
    def layers(self) -> str:
        """What of numbers depends on how layers are computed: a scale of losses decides which small gradients vanish."""
        return f"{self.autocast}, scale {self.scale:g}" if self.autocast == "float16" else self.autocast


@dataclass(frozen=True)
class Opened:
    """A subject in memory."""

    attributed: Attributed
    train: Any
    query: Any

    def data(self, split: str) -> Any:
        """The dataset of a split."""
        return self.train if split == "train" else self.query

    def batching(self, split: Split, examples: int, tokens: int | None) -> Batching:
        """How a split is cut into batches: of so many tokens where that is said, else of so many examples."""
        data = self.data(split)
        lengths = None if tokens is None else lengths_of(self.attributed.problem, split, len(data))
        return examples if tokens is None or lengths is None else Budget(tokens, lengths)


@dataclass(frozen=True)
class _Family:
    """A problem and its datasets, and what is open of its checkpoints."""

    problem: Problem
    train: Any
    query: Any
    opened: dict[Subject, Opened] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _family(spec: str, options: str, source: str, inputs: str) -> _Family:  # noqa: ARG001  (inputs keeps other data apart)
    parsed = json.loads(options)
    problem = load_problem(spec, parsed)
    if source and problem_digest(spec, parsed) != source:
        raise InputError(
            f"problem {spec!r} is not the one that the run was planned with: it was edited meanwhile, "
            "or a worker has another version of it, of tda or of torch; make them the same and start the run again"
        )
    train, query = problem.train_data(), problem.query_data()
    length(train, "train")
    length(query, "query")
    return _Family(problem, train, query)


def open_subject(subject: Subject) -> Opened:
    """Load the problem, its model and its weights, and cut the model into blocks; kept for the next shard of the same worker.

    A worker keeps the last OPEN_AT_ONCE checkpoints of one problem.
    """
    family = _family(subject.problem, subject.options, subject.source, subject.inputs)
    if subject not in family.opened:
        model = family.problem.model()
        if subject.checkpoint:
            state = read_checkpoint(subject.checkpoint)
            if subject.weights and checkpoint.digest(state) != subject.weights:
                raise InputError(f"checkpoint {subject.checkpoint} was replaced while the run was under way; start it again")
            family.problem.restore(model, state, subject.checkpoint)
        if subject.dtype != "auto":
            model = model.to(DTYPES[subject.dtype])
        model = model.to(ready(device_here(subject.device)))
        attributed = inspect(family.problem, model, family.train, modules=subject.modules, exclude=subject.exclude)
        if subject.autocast or subject.recompute:
            attributed = replace(attributed, autocast=SHORTER.get(subject.autocast), recompute=subject.recompute, scale=subject.scale)
        while len(family.opened) >= OPEN_AT_ONCE:
            family.opened.pop(next(iter(family.opened)))
        family.opened[subject] = Opened(attributed, family.train, family.query)
    return family.opened[subject]


def open_problem(subject: Subject) -> Problem:
    """A subject's problem alone, without a model or weights; kept likewise."""
    return _family(subject.problem, subject.options, subject.source, subject.inputs).problem


def forget() -> None:
    """Close what is open: the same names may mean something else by now."""
    _family.cache_clear()


def read_checkpoint(url: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors; InputError where there is no such file or folder, or it is not usable."""
    return checkpoint.read(url)
