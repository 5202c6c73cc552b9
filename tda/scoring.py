"""Scores: inner products of directions with training gradients. One pass over the training examples serves all methods and queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Block, Pair, example_gradients
from tda.capture import Tape
from tda.data import Batching, batches, in_order
from tda.directions import Direction, Factored, check_finite, inner, meets_gradients, scaled, tensors
from tda.products import Products, fast_float32
from tda.projection import Projection, add_block, features_of
from tda.self_products import (
    GRADIENT_BYTES,
    Kronecker,
    Own,
    Plain,
    Projected,
    WholeSpectra,
    block_products,
    gradient_squares,
    part_of,
    projected_products,
    whole_products,
)
from tda.spooled import Met, Spooled


@dataclass(frozen=True)
class Directly:
    """What a method says of a batch without directions: influence (query, batch), its standard error, and self-influence (batch,)."""

    influence: Tensor
    stderr: Tensor | None = None
    own: Tensor | None = None


#: Scores of training examples by their ids, from the model and the recorded forward pass of their batch; a tensor (query, batch) where
#: there is nothing but the influence.
Direct = Callable[[Attributed, Tape, Sequence[int]], Tensor | Directly]


@dataclass(frozen=True)
class Scorer:
    """One method, ready to score: a direction per block, in memory or in a file, and the queries' gradient norms (query,).

    own: what self-influence is taken from, None where the method does not give it. A cosine method's directions are divided by the
    norms at once, so that small gradients' products do not underflow. direct: what scores in place of directions, for methods whose
    scores are no inner products of gradients; they are taken as they are, without the factor 1/N.
    """

    title: str
    directions: Sequence[Met]
    norms: Tensor
    own: Own | None = None
    cosine: bool = False
    direct: Direct | None = None

    def __post_init__(self) -> None:
        if self.cosine:
            first = self.directions[0]
            dtype = first.dtype if isinstance(first, Spooled) else tensors(first)[0].dtype
            inverse = torch.where(self.norms > negligible(dtype), 1 / self.norms.double(), 0.0)
            times = [d.scaled(inverse) if isinstance(d, Spooled) else scaled(d, inverse) for d in self.directions]
            object.__setattr__(self, "directions", times)


@dataclass(frozen=True)
class ShardScores:
    """Scores of one shard.

    influence (method, query, train); self_influence (method, train): each example's effect on its own loss, NaN where a method does not
    give it, or None; loss (train,);
    mass (method, block): sum of |score| by block over the pairs that were asked for, from which the layers' shares are taken. stderr:
    standard errors of the influence, by the place of the methods that estimate them.
    """

    influence: Tensor
    self_influence: Tensor | None
    loss: Tensor
    mass: Tensor
    stderr: dict[int, Tensor] = field(default_factory=dict)


def score(  # noqa: PLR0913  (what is scored, and how)
    attributed: Attributed,
    scorers: Sequence[Scorer],
    dataset: Any,
    ids: Sequence[int],
    *,
    examples: int,
    batch_size: Batching,
    products: Products = "full",
    self_influence: bool = True,
    asked: Tensor | None = None,
) -> ShardScores:
    """Score training examples `ids` of a training set of `examples` (N) under every method.

    influence[q, i] = (1/N) <V_q, grad l_i>: the change of measurement q predicted from adding example i to the training objective with
    weight 1/N. Cosine methods are divided by the norms instead. batch_size: examples, or a budget of tokens. asked (query, train): whether
    a pair counts in the layers' mass; None: all do. Raises InputError naming an example whose loss is not finite.
    """
    with fast_float32():
        parts = list(batches(ids, batch_size))
        places = {i: place for place, i in enumerate(ids)}
        wanted = [None if asked is None else asked[:, [places[i] for i in part]] for part in parts]
        each = zip(parts, wanted, strict=True)
        found = [_score_batch(attributed, scorers, dataset, part, examples, products, self_influence, some) for part, some in each]
    order = in_order(ids, parts)

    def joined(each: Sequence[Tensor]) -> Tensor:
        """Along the last axis, in the order of `ids`."""
        whole = torch.cat(tuple(each), -1)
        return whole if order is None else whole[..., order]

    selves = [f.self_influence for f in found if f.self_influence is not None]
    return ShardScores(
        joined([f.influence for f in found]),
        joined(selves) if selves else None,
        joined([f.loss for f in found]),
        torch.stack([f.mass for f in found]).sum(0),
        {m: joined([f.stderr[m] for f in found]) for m in found[0].stderr},
    )


def _score_batch(
    attributed: Attributed, scorers: Sequence[Scorer], dataset: Any, ids: Sequence[int], examples: int, products: Products, selves: bool,
    asked: Tensor | None,
) -> ShardScores:  # fmt: skip
    batch = attributed.load(dataset, ids)
    tape = attributed.tape(batch, ids)
    loss = attributed.problem.likelihood.loss(tape.precise, batch.targets).to(attributed.dtype)
    check_finite(loss, ids, "loss of train example")
    queries = len(scorers[0].norms) if scorers else 0
    influence = loss.new_zeros(len(scorers), queries, len(ids))
    own = loss.new_zeros(len(scorers), len(ids))
    norms = loss.new_zeros(len(ids), dtype=torch.float64)
    mass = loss.new_zeros(len(scorers), len(attributed.blocks), dtype=torch.float64)
    whole = selves and any(isinstance(s.own, WholeSpectra) for s in scorers)
    kept = [loss.new_zeros(len(ids), block.size) for block in attributed.blocks] if whole else None
    projected: dict[Projection, dict[int, Tensor]] = {s.own.projection: {} for s in scorers if selves and isinstance(s.own, Projected)}
    if not scorers:
        return ShardScores(influence, own if selves else None, loss, mass)
    direct = _score_directly(attributed, scorers, tape, ids, influence)
    made = [(m, scorer) for m, scorer in enumerate(scorers) if m not in direct]
    each = zip(attributed.blocks, tape.pairs(tape.seed(attributed.problem.likelihood.loss)), strict=True) if made else ()
    for b, (block, pairs) in enumerate(each):
        if not pairs:
            continue
        scores = _block_scores(block, [s.directions[b] for _, s in made], pairs, products)
        for (m, scorer), part in zip(made, scores, strict=True):
            influence[m] += part
            mass[m, b] = (part if asked is None else part[asked]).abs().sum(dtype=torch.float64)
            if selves and isinstance(scorer.own, Plain | Kronecker) and not scorer.cosine:
                own[m] += block_products(scorer.own, b, block, pairs, products)
        if any(s.cosine for s in scorers):
            norms += gradient_squares(block, pairs)
        if kept is not None:
            kept[b] = example_gradients(block, pairs).flatten(1)
        for projection, sums in projected.items():
            add_block(projection, attributed.blocks, b, pairs, sums)
    features = {projection: features_of(projection, attributed.blocks, sums, len(ids)) for projection, sums in projected.items()}
    for m, scorer in enumerate(scorers):
        if selves and isinstance(scorer.own, WholeSpectra | Projected):
            own[m] = _across_blocks(scorer.own, kept, features)
        _to_unit(scorer, influence[m], own[m], norms, examples)
        check_finite(influence[m].abs().sum(0) + own[m], ids, f"{scorer.title} score (the gradient) of train example")
        if scorer.own is None:
            told = direct[m].own if m in direct else None
            own[m] = torch.full_like(loss, torch.nan) if told is None else told
    errors = {m: said.stderr.to(loss.dtype) for m, said in direct.items() if said.stderr is not None}
    return ShardScores(influence, own if selves else None, loss, mass, errors)


def _across_blocks(own: WholeSpectra | Projected, kept: list[Tensor] | None, features: dict[Projection, list[Tensor]]) -> Tensor:
    """Self-influence (batch,) that is no sum over blocks, from all of their gradients or from their projections."""
    if isinstance(own, Projected):
        return projected_products(own, features[own.projection])
    assert kept is not None
    return whole_products(own, kept)


def _score_directly(
    attributed: Attributed, scorers: Sequence[Scorer], tape: Tape, ids: Sequence[int], influence: Tensor
) -> dict[int, Directly]:
    """What those that need no gradients say, by their places; their scores are put in place."""
    said = {m: scorer.direct(attributed, tape, ids) for m, scorer in enumerate(scorers) if scorer.direct is not None}
    found = {m: Directly(each) if isinstance(each, Tensor) else each for m, each in said.items()}
    for m, each in found.items():
        influence[m] = each.influence
    return found


def negligible(dtype: torch.dtype) -> float:
    """A gradient shorter than this is nothing but denormal numbers: it has no direction, and its cosines are 0."""
    return torch.finfo(dtype).tiny * 2.0**20


def _to_unit(scorer: Scorer, influence: Tensor, own: Tensor, norms: Tensor, examples: int) -> None:
    """In place: the common sign and unit, or the cosine; direct scores stay as they are."""
    if scorer.direct is not None:
        return
    if scorer.cosine:
        lengths = norms.sqrt()
        influence.copy_(torch.where(lengths > negligible(influence.dtype), influence.double() / lengths, 0.0))
        own.fill_(-1.0)
    else:
        influence /= examples
        own /= -examples


def _block_scores(block: Block, directions: Sequence[Met], pairs: Sequence[Pair], products: Products) -> list[Tensor]:
    """(query, batch) of each direction for one block; gradients are made once for all of them, in pieces that bound the memory."""
    size, positions = pairs[0].left.shape[1], sum(pair.positions for pair in pairs)
    meeting = [_meets(d, block, positions, size) for d in directions]
    needed = any(meeting)
    # Matrices of factored directions are made anew for each piece: fewer, larger pieces then.
    bound = GRADIENT_BYTES * (4 if any(m and _of_terms(d) for m, d in zip(meeting, directions, strict=True)) else 1)
    step = max(1, bound // (4 * block.size)) if needed else size
    pieces: list[list[Tensor]] = [[] for _ in directions]
    for start in range(0, size, step):
        part = pairs if step >= size else [part_of(pair, start, start + step) for pair in pairs]
        gradients = _gradients(block, part, products) if needed else None
        for into, direction, meets in zip(pieces, directions, meeting, strict=True):
            each = direction.parts() if isinstance(direction, Spooled) else (direction,)
            into.append(torch.cat([inner(some, block, part, gradients if meets else None, products) for some in each]))
    return [p[0] if len(p) == 1 else torch.cat(p, 1) for p in pieces]


def _meets(direction: Met, block: Block, positions: int, batch: int) -> bool:
    if isinstance(direction, Spooled):
        return block.form != "embedding"
    return meets_gradients(direction, block, positions, batch)


def _of_terms(direction: Met) -> bool:
    return isinstance(direction, Factored) or (isinstance(direction, Spooled) and direction.rank is not None)


def _gradients(block: Block, pairs: Sequence[Pair], products: Products) -> Tensor:
    if products == "full" or pairs[0].positions == 1:
        return example_gradients(block, pairs)
    parts = [(pair.left.bfloat16().transpose(2, 3) @ pair.right.bfloat16()).transpose(0, 1) for pair in pairs]
    return sum(parts[1:], start=parts[0])


def score_error(
    attributed: Attributed, dataset: Any, ids: Sequence[int], short: Sequence[Direction], exact: Sequence[Direction], *, batch_size: int
) -> float:
    """Relative Frobenius error of the scores of `short` directions against those of `exact` ones, on training examples `ids`."""
    wrong, whole = 0.0, 0.0
    with fast_float32():
        for part in batches(ids, batch_size):
            batch = attributed.load(dataset, part)
            tape = attributed.tape(batch, part)
            off, right = (torch.zeros((), device=attributed.device) for _ in range(2))
            pairs = tape.pairs(tape.seed(attributed.problem.likelihood.loss))
            for block, found, a, b in zip(attributed.blocks, pairs, short, exact, strict=True):
                if found:
                    mine, true = (_block_scores(block, [direction], found, "full")[0].double() for direction in (a, b))
                    off, right = off + (mine - true), right + true
            wrong, whole = wrong + float(off.square().sum()), whole + float(right.square().sum())
    return (wrong / whole) ** 0.5 if whole else 0.0
