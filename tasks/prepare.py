"""Before anything is computed or written: everything a user can get wrong is looked at."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tasks.subject import Opened, Subject, forget, open_subject
from tasks.training import check_recipe, segments_of
from tda.data import batches, digest, length, lengths_of
from tda.directions import check_finite
from tda.errors import InputError
from tda.methods import Method, parse_all
from tda.methods.multistage import Multistage
from tda.problem import Problem, Split, can_fit, problem_digest
from tda.products import Products
from tda.recompute import repeated_layers
from tda.sampling.refusals import TRIED, check_model
from tda.sampling.settle import given
from tda.selfcheck import check_autocast

#: So many examples of each split are evaluated before a run starts; the others' losses are checked when they are scored.
PROBED = 1024
SPLITS: tuple[Split, ...] = ("train", "query")


@dataclass(frozen=True)
class Request:
    """What the user asked for, in strings and numbers.

    methods, options and candidates (empty: all are scored) are JSON; sizes may be None; ensemble: models to train.
    """

    subject: Subject
    store: str
    seed: int
    products: Products
    methods: tuple[str, ...]
    batch_size: int | None
    shard_size: int | None
    query_block: int | None
    self_influence: bool
    ensemble: int = 1
    candidates: str = ""
    batch_tokens: int | None = None
    layer_block: int | None = None


@dataclass(frozen=True)
class Inputs:
    """What the data and the code are: digests, counts and integer labels by split."""

    problem: str
    train: str
    query: str
    examples: int
    queries: int
    train_labels: np.ndarray | None
    query_labels: np.ndarray | None
    stages: Mapping[str, Inputs] = field(default_factory=dict)
    """Of the stages before, by name, where a method attributes to them (`tasks.chain`); queries are the run's."""
    candidates: Mapping[str, str] = field(default_factory=dict)
    """Digests of what candidates are chosen by, beside data and problem (`tasks.choose`)."""


def examine(request: Request) -> Inputs:
    """Load and check everything; nothing is written. Raises InputError in one line, also for whatever the problem's own code raises."""
    with telling(request.subject.problem):
        return _examined(request)


@contextmanager
def telling(problem: str) -> Iterator[None]:
    """Whatever a problem's own code raises in the block is told as an InputError in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno}, in {place.name})"
        raise InputError(f"problem {problem!r} cannot be evaluated: {said}; set TDA_TRACEBACK=1 to see all of it") from error


def _examined(request: Request) -> Inputs:
    methods = parse_all([json.loads(text) for text in request.methods])
    subject = request.subject
    forget()  # a schedule's process may have opened what lay here yesterday
    if subject.dtype == "float64" and request.products == "bfloat16":
        raise InputError('products = "bfloat16" makes no sense with dtype = "float64"; leave one of them out')
    opened = open_subject(subject)
    problem = opened.attributed.problem
    check_precision(request, opened)
    if subject.checkpoint and request.ensemble > 1:
        raise InputError(
            f"ensemble = {request.ensemble} trains that many models, and the config gives a checkpoint; leave one of the two out"
        )
    if not subject.checkpoint and not can_fit(problem):
        raise InputError(f"problem {subject.problem!r} has no fit method and the config no checkpoint; give one of them")
    check_batches(request, opened)
    found = {split: digested(opened, split) for split in ("train", "query")}
    for split in ("train", "query"):
        probe(opened, split)
    for method in methods:
        check_method(method, opened)
        if method.meets != "final" and subject.checkpoint:
            segments_of(method, subject.checkpoint)
        elif method.meets != "final":
            check_recipe(method, problem, length(opened.train, "train"))
    return Inputs(
        problem_digest(subject.problem, json.loads(subject.options)),
        found["train"][0],
        found["query"][0],
        length(opened.train, "train"),
        length(opened.query, "query"),
        found["train"][1],
        found["query"][1],
    )


def check_precision(request: Request, opened: Opened) -> None:
    """InputError where shorter products or recomputed layers are asked of a model that has no use for them."""
    subject, whose = request.subject, f"the float64 model of {request.subject.problem!r}"
    wide = opened.attributed.dtype == torch.float64
    if wide and request.products == "bfloat16":
        raise InputError(f'products = "bfloat16" makes no sense with {whose}; set dtype = "float32", or leave products out')
    if wide and subject.autocast:
        raise InputError(f'autocast = "{subject.autocast}" makes no sense with {whose}; set dtype = "float32", or leave it out')
    if subject.autocast:
        check_autocast(opened.attributed, opened.attributed.load(opened.train, range(min(2, len(opened.train)))))
    if subject.recompute and not repeated_layers(opened.attributed.model):
        raise InputError(
            f"checkpoint_activations = true is about layers in an nn.ModuleList of several, and the model of {subject.problem!r} has none; "
            "leave it out, and lower batch_size where memory is short"
        )


def check_batches(request: Request, opened: Opened, splits: Sequence[Split] = SPLITS) -> None:
    """InputError where batches are asked for in two ways, or in tokens of a problem that does not tell how many its examples have."""
    told = [lengths_of(opened.attributed.problem, split, length(opened.data(split), split)) for split in splits]
    if request.batch_tokens is None:
        return
    if request.batch_size is not None:
        raise InputError(
            f"batch_size = {request.batch_size} counts examples and batch_tokens = {request.batch_tokens} tokens; leave one of them out"
        )
    if any(each is None for each in told):
        raise InputError(
            f"batch_tokens = {request.batch_tokens}: problem {request.subject.problem!r} does not say how long its examples are; define "
            "Problem.lengths, or use batch_size"
        )


def digested(opened: Opened, split: str) -> tuple[str, np.ndarray | None]:
    """Digest and integer labels of a split, every example of which is looked at."""
    return digest(opened.attributed.problem, opened.data(split), split, check=_target_check(opened, split))


def check_method(method: Method, opened: Opened) -> None:
    """InputError where a method cannot be used with a problem and its model."""
    problem = opened.attributed.problem
    if any(fit.kind == "kronecker" and fit.of == "exact" for fit in method.fits):
        batch = opened.attributed.load(opened.train, [0])
        next(problem.likelihood.hessian_columns(opened.attributed.tape(batch).outputs.detach(), batch.targets))
    _check_products(method.own_stage if isinstance(method, Multistage) else method, problem)
    _check_chains(method, opened)
    method.check(opened.attributed)


def _check_products(method: Method, problem: Problem) -> None:
    """InputError where a method takes products with the GGN, and the problem's likelihood is not made for them."""
    if getattr(method, "curvature", "") in ("ggn", "block_ggn") and not hasattr(problem.likelihood, "hessian_product"):
        raise InputError(
            f"method {method.title!r} needs hessian_product(outputs, targets, tangents) of likelihood {type(problem.likelihood).__name__}, "
            'which has none; define it, or use the Hessian: name = "hessian", or curvature = "hessian"'
        )


def _check_chains(method: Method, opened: Opened) -> None:
    """InputError where a method needs chains, and the model's loss is none to sample, or the data are fewer than a batch."""
    for fit in method.fits:
        if fit.kind == "chains":
            size = given(json.loads(fit.of) | {"seed": 0}).batch(length(opened.train, "train"))
            some = range(min(TRIED, len(opened.train)))
            check_model(opened.attributed, opened.attributed.load(opened.train, some), size)


def _target_check(opened: Opened, split: str) -> Callable[[Tensor], None]:
    """likelihood.check for targets of a split without a forward pass each: against outputs of the shape that the first example has."""
    attributed = opened.attributed
    with torch.no_grad():
        outputs = attributed.problem.predict(attributed.model, attributed.load(opened.data(split), [0])).cpu()

    def check(targets: Tensor) -> None:
        # With a class axis last, as many positions as the targets have: sequences may be of other lengths than the first.
        last = outputs.ndim == targets.ndim + 1
        row = outputs.reshape(-1, outputs.shape[-1])[0] if last else outputs[0]
        attributed.problem.likelihood.check(row.expand(*targets.shape if last else targets.shape[:1], *row.shape), targets)

    return check


def probe(opened: Opened, split: str) -> None:
    """Evaluate the first examples of a split: finite losses and measurements, one per example."""
    attributed, data = opened.attributed, opened.data(split)
    problem = attributed.problem
    function = problem.likelihood.loss if split == "train" else problem.measurement
    with torch.no_grad():
        for ids in batches(range(min(len(data), PROBED)), 64):
            batch = attributed.load(data, ids)
            outputs = problem.predict(attributed.model, batch)
            try:
                problem.likelihood.check(outputs, batch.targets)
            except InputError as error:
                raise InputError(f"{split} examples {ids[0]}..{ids[-1]}: {error}") from error
            check_finite(function(outputs, batch.targets), ids, f"{'loss' if split == 'train' else 'measurement'} of {split} example")
