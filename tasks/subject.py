"""What a task computes on: a problem at a checkpoint, named by strings, opened once per worker process."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from tda import checkpoint, location
from tda.attributed import Attributed
from tda.data import length
from tda.errors import InputError
from tda.modules import inspect
from tda.problem import import_problem, load_problem, problem_digest

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Subject:
    """A problem (`options` is JSON), its checkpoint's URL ("" for the weights that its model starts with), and which modules.

    weights, source and inputs are digests of the checkpoint, of the problem and of both with the data, as they were when the run was
    planned, "" before. They keep what a long-lived process has opened apart from what lies at the same place later.
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


@dataclass(frozen=True)
class Opened:
    """A subject in memory."""

    attributed: Attributed
    train: Any
    query: Any

    def data(self, split: str) -> Any:
        """The dataset of a split."""
        return self.train if split == "train" else self.query


@lru_cache(maxsize=1)
def open_subject(subject: Subject) -> Opened:
    """Load the problem, its model and its weights, and cut the model into blocks; kept for the next shard of the same worker."""
    options = json.loads(subject.options)
    problem = load_problem(subject.problem, options)
    if subject.source and problem_digest(subject.problem, options) != subject.source:
        raise InputError(
            f"problem {subject.problem!r} is not the one that the run was planned with: it was edited meanwhile, "
            "or a worker has another version of it, of tda or of torch; make them the same and start the run again"
        )
    model = problem.model()
    if subject.checkpoint:
        state = read_checkpoint(subject.checkpoint)
        if subject.weights and checkpoint.digest(state) != subject.weights:
            raise InputError(f"checkpoint {subject.checkpoint} was replaced while the run was under way; start it again")
        checkpoint.fill(model, state, subject.checkpoint)
    if subject.dtype != "auto":
        model = model.to(DTYPES[subject.dtype])
    train, query = problem.train_data(), problem.query_data()
    length(train, "train")
    length(query, "query")
    return Opened(inspect(problem, model, train, modules=subject.modules, exclude=subject.exclude), train, query)


def warm(subject: Subject) -> None:
    """Import everything ahead of the first shard. What fails here is told by the shard that needs it.

    Nothing is opened: the weights may not be there yet, and a model opened without them would be held beside the right one.
    """
    import tasks.scores  # noqa: F401  (and with it all that shards use)

    with suppress(Exception):
        import_problem(subject.problem)


def read_checkpoint(url: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors; InputError where there is no such file or it is not usable."""
    try:
        return checkpoint.parse(location.read_bytes(url), url)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {url} does not exist; correct the path, or leave it out to train one") from error
