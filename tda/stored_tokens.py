"""Scores of single tokens under the gradient methods of a run: its stored directions, met by its problem's own training gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from safetensors.torch import load
from torch import Tensor

from tda import checkpoint, location, schema
from tda.attributed import Attributed
from tda.directions import Dense, Direction, Factored, count, take
from tda.errors import InputError
from tda.loss_scale import SCALE
from tda.methods import Method, parse_all
from tda.methods.ekfac import EKFAC
from tda.methods.sweep import expand
from tda.methods.work import Work
from tda.modules import inspect
from tda.problem import load_problem, problem_digest
from tda.stored_factors import load_factors
from tda.token_scores import position_gradients, token_scores

if TYPE_CHECKING:
    from tda.results import Run

DTYPES = {"float32": torch.float32, "float64": torch.float64}
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


#: Methods whose directions are a fixed linear map of gradients, given by factors.
FACTORED = ("graddot", "kfac", "ekfac")
#: What the directions of the query's positions may take at once.
MEMORY = 1 << 28


def token_influence(
    run: Run, query: int, train: Sequence[int], method: str | None, member: int, *, by_query_token: bool = False
) -> xr.DataArray:
    """(train, train_token): as `Run.token_influence` says, of a gradient method; of the run's last one when absent.

    by_query_token: (train, train_token, query_token), from the method's factors, exactly: without the approximations of `separable`
    and `query_rank`, and without the rounding of stored directions.

    The problem is opened here, at the weights of the run. Raises NotStored where the method has no directions of that kind, InputError
    where the problem, its data or its weights are not what the run was made of.
    """
    prints = run.manifest.get("members", [run.manifest["fingerprints"]])[member]
    title = _method(run, method, prints["directions"])
    attributed = _opened(run, prints["checkpoint"])
    examples = len(attributed.problem.train_data())
    if by_query_token:
        work = Work(attributed, None, _curvature(run, attributed, _methods(run)[title], prints), seed=0, batch_size=1)
        scores = joint_scores(work, _methods(run)[title], query, train, examples=examples)
        dims: tuple[str, ...] = ("train", "train_token", "query_token")
    else:
        directions = _directions(run, prints["directions"][title], query)
        with torch.enable_grad():
            scores = token_scores(attributed, directions, attributed.problem.train_data(), list(train), examples=examples)[0]
        dims = ("train", "train_token")
    values: np.ndarray[Any, Any] = scores.float().numpy()
    attrs: dict[str, Any] = {"units": schema.UNITS, "sign": schema.SIGN, "query": int(query), "method": title}
    return xr.DataArray(values, dims=dims, coords={"train": list(train)}, attrs=attrs, name="token_influence")


def joint_scores(work: Work, method: Method, query: int, train: Sequence[int], *, examples: int) -> Tensor:
    """What each position of a query and each of training examples add to the scores: (train, train_token, query_token).

    Directions are made of the gradients of the query's positions, as if each were a query. Raises NotStored where the method's directions
    are not a fixed linear map of gradients, given by factors.
    """
    from tda.results import NotStored

    if method.name not in FACTORED:
        raise NotStored(f"the parts of a query's tokens are known under {', '.join(FACTORED)} and bif, not under {method.title!r}")
    # A low rank of each position's directions is none of their sum's.
    method = method.model_copy(update={"query_rank": None} | ({"separable": 0.0} if isinstance(method, EKFAC) else {}))
    attributed = work.attributed
    problem = attributed.problem
    with torch.enable_grad():
        gradients = position_gradients(attributed, problem.query_data(), query)
        size = sum(block.size for block in attributed.blocks) * attributed.dtype.itemsize * (method.vectors + 1)
        tokens, step = count(gradients[0]), max(1, MEMORY // size)
        parts = []
        for start in range(0, tokens, step):
            some = [take(gradient, slice(start, start + step)) for gradient in gradients]
            made = method.directions(work, some).passes[0]
            parts.append(token_scores(attributed, made, problem.train_data(), list(train), examples=examples))
    return torch.cat(parts).movedim(0, -1)


def _curvature(run: Run, attributed: Attributed, method: Method, prints: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The factors of a method, from the artifacts that the run names; none where they are not of that kind."""
    marks = prints.get("fits", {}).get(method.title, {})
    found = []
    for fit in method.fits:
        if fit.kind == "kronecker":
            url = location.join(run.store, "artifacts", "factors", marks[fit.key])
            try:
                found.append(tuple(load_factors(url, attributed.blocks)))
            except FileNotFoundError as error:
                raise InputError(f"the factors of run {run.id} are gone from {url}; run its config again to fit them") from error
    return found


def _methods(run: Run) -> dict[str, Method]:
    return {method.title: method for method in parse_all([swept.table for swept in expand(run.manifest["config"]["methods"])])}


def _method(run: Run, asked: str | None, stored: dict[str, str]) -> str:
    """The title of the method that is meant."""
    from tda.results import NotStored

    able = [t for t, m in _methods(run).items() if t in stored and m.meets == "final" and not m.cosine and m.takes_gradients]
    if asked is None and able:
        return able[-1]
    if asked not in able:
        known = f"it has those of {', '.join(able)}" if able else "gradient methods that score at the final weights have them"
        raise NotStored(f"run {run.id} has no scores of single tokens under {asked!r}; {known}")
    return str(asked)


def _opened(run: Run, weights: str) -> Attributed:
    """The run's problem at its weights, cut into the blocks that the run had."""
    config = run.manifest["config"]
    spec, options = run.manifest["problem"], config["problem_options"]
    if problem_digest(spec, options) != run.manifest["fingerprints"]["problem"]:
        raise InputError(
            f"problem {spec!r} is not the one of run {run.id}: it was edited since, or tda or torch were; run its config again"
        )
    problem = load_problem(spec, options)
    model = problem.model()
    state, where = _weights(run, config.get("checkpoint"), weights)
    problem.restore(model, state, where)
    if config["dtype"] != "auto":
        model = model.to(DTYPES[config["dtype"]])
    found = inspect(problem, model, problem.train_data(), modules=config["modules"], exclude=config["exclude"])
    short, recompute = config.get("autocast"), config.get("checkpoint_activations", False)  # absent in runs of before
    scale = config.get("autocast_scale", SCALE)
    return replace(found, autocast=AUTOCAST[short] if short else None, recompute=recompute, scale=scale)


def _weights(run: Run, given: str | None, digest: str) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors that the run was made at: its checkpoint's, or those of a training in its store."""
    trained = location.join(run.store, "artifacts", "checkpoint")
    places = [given] if given else [location.join(trained, name, "weights.safetensors") for name in location.list_names(trained)]
    for url in places:
        if given or location.exists(url):
            state = checkpoint.read(url)
            if checkpoint.digest(state) == digest:
                return state, url
    raise InputError(f"the weights of run {run.id} are gone from {given or trained}; run its config again")


def _directions(run: Run, mark: str, query: int) -> list[Direction]:
    """The directions of one query, by block."""
    url = location.join(run.store, "artifacts", "directions", mark)
    start = 0
    for name in location.list_names(url):
        if name.startswith("queries-") and name.endswith(".safetensors"):
            tensors = load(location.read_bytes(location.join(url, name)))
            place, start = query - start, start + len(tensors["measurement"])
            if query < start:
                count = 1 + max(int(key.split("/")[1]) for key in tensors if key.startswith("0/"))
                return [take(_direction(tensors, f"0/{b}/"), slice(place, place + 1)) for b in range(count)]
    raise InputError(f"the directions of run {run.id} are gone from {url}; run its config again to make them")


def _direction(tensors: dict[str, torch.Tensor], key: str) -> Direction:
    if key + "matrix" in tensors:
        return Dense(tensors[key + "matrix"])
    return Factored(tensors[key + "left"], tensors[key + "right"])
