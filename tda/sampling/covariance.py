"""Covariance over the draws of chains, of every training example's loss with every query's measurement, with its standard error.

    cov_c[q, i]   = (1/T) [ sum_t x_i(t) f_q(t)  +  sum_b L_b / (B - 1) x_i(b) f_q(b) ]      within chain c
    cov[q, i]     = mean over chains c of cov_c[q, i]
    stderr[q, i]  = the larger of
        between chains  std over c of cov_c / sqrt(C)
        batch means     sqrt( B / (B - 1) sum_c sum_b (p_cb - mean over b of p_cb)^2 ) / (C T)

x_i(t), f_q(t): the draws minus their mean over the chain, taken away *before* multiplying, since E[x f] - E[x] E[f] in float32 loses
everything where the mean is large beside the spread. b: B stretches of L_b neighbouring draws that differ in length by one at most;
x_i(b): the mean of such a stretch; p_cb: its share of the bracket.

**The divisor.** With independent draws the bracket over T is unbiased, as 1/(T - 1) without the second term would be. Draws of a chain are
correlated: the chain's own mean then takes away 2 tau / T of the covariance (tau draws to forget), and averaging over more chains does
not help. The second term is the estimate of that by batch means. AR(1) chains of 500 draws with tau = 20 are biased by 7% with 1/(T - 1)
and by 2% so; their 90% intervals cover .87 instead of .76 at eight chains.

**The standard error.** Between chains there are C - 1 degrees of freedom alone, and batch means are too small where a stretch is not much
longer than 2 tau; the larger of both errs least. Multiplied by 1.645, it covers in simulations (AR(1), T = 500, 1,800 runs, values and
correlations of unrelated, linear, and strongly curved losses; nominal .90)

    chains      tau = 0      4.5          10           20 draws
    4 and 8     .90-.93      .88-.92      .85-.91      .80-.90     (.86-.90 without the curved)
    2           .88-.90      .85-.89      .82-.90      .77-.87
    1           .78-.79      .73-.79      .68-.78      .62-.77     batch means alone: run more chains

Between chains alone would cover .72-.82 at four chains. 5 or 8 batches instead of 4 change it by .01 from two chains on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod, sqrt

import numpy as np
import torch
from torch import Tensor

from tda.errors import InputError
from tda.products import fast_float32

#: The unit of normalized scores.
CORRELATION = "correlation"
#: Stretches of draws per chain: few enough that each is long beside the memory of the chain.
BATCHES = 4

#: Queries and examples of one tile: products this large run at full speed, and what they are added up in stays in the caches.
TILE = 512

#: Examples made ready at a time: rows of 8 KB, since shorter pieces of a large array are slow to read.
COLUMNS = 2048

#: A series whose spread is below so many roundings of its mean does not move.
ROUNDINGS = 8


@dataclass(frozen=True)
class Stored:
    """Trajectories that are read block by block: read, from a slice of the series to (chain, draw, series of the slice[, token]).

    count: length of that axis. block: how much of it is read at a time; choose whole chunks of what is stored.
    """

    read: Callable[[slice], Tensor]
    count: int
    block: int = 4096


@dataclass(frozen=True, eq=False)
class Series:
    """Trajectories made ready for products: centred, cut in batches, each with the row that makes the divisor unbiased.

    rows (chain, batch, row, series); shape: of the series, flattened in the last axis; draws: T. squares (chain, batch, series): sums of
    squares, where the series are scaled to variance 1; still: which of them do not move (all their rows are 0 then).
    """

    rows: Tensor
    shape: tuple[int, ...]
    draws: int
    squares: Tensor | None
    still: Tensor


@dataclass(frozen=True, eq=False)
class Tile:
    """A block of a covariance: value and stderr, (query[, token], train[, token]), of queries and examples in these slices."""

    queries: slice
    examples: slice
    value: Tensor
    stderr: Tensor


def covariance(
    train: Tensor,
    query: Tensor | Series,
    *,
    batches: int = BATCHES,
    normalized: bool = False,
    chains: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(value, stderr), each (*query axes, *train axes): posterior covariance of training losses with measurements; see the module.

    train (chain, draw, train[, token]), query (chain, draw, query[, token]), or what `series` made of it with the same batches, normalized
    and chains. Any measurement. float64 is computed in float64, everything else in float32. Units: those of train x query; the sign is
    the covariance's, and influence is -(n_beta / N) times it. It is bilinear: sums over tokens are the covariance of the sums.

    normalized: the posterior correlation, cov / sqrt(var var), in [-1, 1]; its standard error by the delta method, from the same formula
    with p_cb - (cor / 2) (x_cb^2 + f_cb^2) for p_cb. A series that does not move has correlation 0 with all, and standard error 0
    (`still_series` counts them). batches: per chain, at most one per draw. chains: which to use, all where None.

    Raises:
        InputError: a draw of a used chain is not finite (its chain is named); fewer than 2 draws or batches; no chain; the two do not
            belong together.
    """
    right = query if isinstance(query, Series) else series(query, batches=batches, normalized=normalized, chains=chains)
    used = range(train.shape[0]) if chains is None else chains
    if (len(used), train.shape[1]) != (len(right.rows), right.draws):
        raise InputError(
            f"train trajectories of {len(used)} chains x {train.shape[1]} draws do not belong to those of the queries, "
            f"{len(right.rows)} x {right.draws}"
        )
    if right.rows.shape[1] != min(batches, right.draws) or (right.squares is not None) != normalized:
        raise InputError("the queries were made ready with other batches or normalized; give `series` the same options")
    flat = train.reshape(*train.shape[:2], -1)
    value, error = (_empty((prod(right.shape), flat.shape[2]), right.rows) for _ in range(2))
    numbers = right.rows[..., 0].numel() * min(COLUMNS, flat.shape[2])
    rooms = threading.local()

    def fill(columns: slice) -> None:
        if not hasattr(rooms, "own"):
            rooms.own = _empty((numbers,), right.rows)
        left = _series(flat[:, :, columns], used, batches, rooms.own, normalized=normalized)
        _rectangle(left, right, value[:, columns], error[:, columns])

    with fast_float32():
        _side_by_side(fill, list(_slices(flat.shape[2], COLUMNS)))
    shape = (*right.shape, *train.shape[2:])
    return value.view(shape), error.view(shape)


def covariance_blocks(
    train: Stored,
    query: Stored,
    *,
    batches: int = BATCHES,
    normalized: bool = False,
    chains: Sequence[int] | None = None,
) -> Iterator[Tile]:
    """Tiles of `covariance` over all examples and queries, one after another, of trajectories that need not fit in memory.

    All of train is read once per block of queries. Tiles follow each other by query block, then example block. Memory: the prepared
    queries of one block, one block of examples, and one tile; nothing else grows with either count.

    Raises:
        InputError: as `covariance`, when its tile is reached.
    """
    for queries in _slices(query.count, query.block):
        right = series(query.read(queries), batches=batches, normalized=normalized, chains=chains)
        for examples in _slices(train.count, train.block):
            block = train.read(examples)
            value, error = covariance(block, right, batches=batches, normalized=normalized, chains=chains)
            yield Tile(queries, examples, value, error)


def still_series(trajectories: Tensor, chains: Sequence[int] | None = None) -> int:
    """How many series of (chain, draw, ...) do not move in any of the chains, beyond rounding: their correlation is put at 0."""
    flat = trajectories.reshape(*trajectories.shape[:2], -1)
    return sum(int(series(flat[:, :, part], normalized=True, chains=chains).still.sum()) for part in _slices(flat.shape[2], COLUMNS))


def series(trajectories: Tensor, *, batches: int = BATCHES, normalized: bool = False, chains: Sequence[int] | None = None) -> Series:
    """Trajectories (chain, draw, ...) made ready, worth it for queries that meet many blocks of examples. Arguments as `covariance`.

    Raises:
        InputError: as `covariance`.
    """
    used = range(len(trajectories)) if chains is None else chains
    draws = trajectories.shape[1]
    if not used or draws < 2 or batches < 2:
        raise InputError(f"a covariance needs a chain, 2 draws and 2 batches; got {len(used)} chains, draws = {draws}, batches = {batches}")
    dtype = torch.float64 if trajectories.dtype == torch.float64 else torch.float32
    room = torch.empty(0, dtype=dtype, device=trajectories.device)
    found = _series(trajectories, used, batches, room, normalized=normalized)
    return replace(found, rows=found.rows.mT.contiguous().mT)  # a left factor is read along its rows


def _series(trajectories: Tensor, used: Sequence[int], batches: int, room: Tensor, *, normalized: bool) -> Series:
    """`series`, with its rows in room (numbers,) where that is large enough."""
    flat = trajectories.reshape(*trajectories.shape[:2], -1)
    draws = trajectories.shape[1]
    cuts, longest = _cuts(draws, batches)
    shape = (len(used), len(cuts), longest + 1, flat.shape[2])
    rows = room[: prod(shape)].view(shape) if prod(shape) <= len(room) else room.new_empty(shape)
    offset = torch.zeros_like(rows[0, 0, 0])
    for place, chain in zip(rows, used, strict=True):
        mean = flat[chain].mean(0, dtype=rows.dtype)
        if not bool(mean.isfinite().all()):
            raise InputError(f"chain {chain} has draws that are not finite; leave the chain out, or sample again with a smaller step_size")
        torch.maximum(offset, mean.abs(), out=offset)
        for batch, cut in zip(place, cuts, strict=True):
            length = len(cut)
            torch.sub(flat[chain, cut.start : cut.stop], mean, out=batch[:length])
            batch[length:].zero_()
            torch.sum(batch[:length], 0, out=batch[-1]).mul_(1 / sqrt(length * (len(cuts) - 1)))
    squares, still = _normalize(rows, offset, draws) if normalized else (None, offset.new_zeros(offset.shape, dtype=torch.bool))
    return Series(rows, tuple(trajectories.shape[2:]), draws, squares, still)


def _normalize(rows: Tensor, offset: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Scale each series of rows in place to variance 1, or to 0 where it does not move: (sums of squares (chain, batch, series), still)."""
    squares = rows.square().sum(2)
    variance = squares.sum((0, 1)) / (len(rows) * draws)
    still = variance.sqrt() <= ROUNDINGS * torch.finfo(rows.dtype).eps * offset
    scale = torch.where(still, 0.0, variance.rsqrt())
    rows.mul_(scale)
    return squares.mul_(scale).mul_(scale).nan_to_num_(0.0), still


def _cuts(draws: int, batches: int) -> tuple[list[range], int]:
    """Ranges of neighbouring draws, and the longest's length."""
    count = min(batches, draws)
    ends = [draws * k // count for k in range(count + 1)]
    cuts = [range(a, b) for a, b in pairwise(ends)]
    return cuts, max(map(len, cuts))


def _side_by_side(fill: Callable[[slice], None], parts: list[slice]) -> None:
    """fill each part: as many at once as torch has threads, each on one, since what is done to a tile is too short to be shared."""

    def alone(part: slice) -> None:
        torch.set_num_threads(1)
        with torch.no_grad():
            fill(part)

    threads = torch.get_num_threads()
    if min(threads, len(parts)) < 2:
        with torch.no_grad():
            for part in parts:
                fill(part)
        return
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(alone, parts))
    finally:
        torch.set_num_threads(threads)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """As like.new_empty(shape); on a CPU by way of NumPy, which asks for large pages: their first use is quicker by far."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, np.float64 if like.dtype == torch.float64 else np.float32))


def _slices(size: int, most: int) -> Iterator[slice]:
    """0..size in pieces of `most` at most."""
    return (slice(start, min(size, start + most)) for start in range(0, size, most))


def _rectangle(left: Series, right: Series, value: Tensor, error: Tensor) -> None:
    """Fill value and error (query, train) tile by tile."""
    step = -(-value.shape[0] // max(1, -(-value.shape[0] // TILE)))
    room = value.new_empty(5, step * min(TILE, value.shape[1]))
    for columns in _slices(value.shape[1], TILE):
        for some in _slices(value.shape[0], step):
            place = value[some, columns]
            sums = _Sums(left.rows.shape[0], left.rows.shape[1], left.draws, *(each[: place.numel()].view(place.shape) for each in room))
            _tile(left, right, columns, some, sums, place)
            sums.stderr(error[some, columns])


def _tile(left: Series, right: Series, columns: slice, some: slice, sums: _Sums, value: Tensor) -> None:
    """The sums over all chains and batches of one tile, and its value (query, train)."""
    x, f = left.rows[..., columns], right.rows[..., some]
    count = len(x) * left.draws
    if left.squares is None or right.squares is None:
        sums.add(x, f, None)
        torch.mul(sums.total, 1 / count, out=value)
        return
    correlation = torch.einsum("cbrq,cbri->qi", f, x).div_(count)
    sums.add(x, f, (correlation / -2, left.squares[..., columns], right.squares[..., some]))
    value.copy_(correlation.clamp_(-1, 1))


@dataclass(frozen=True, eq=False)
class _Sums:
    """Over all p_cb of a tile, (query, train) each: total; chain: of one chain; part: of one batch; and of squares.

    Sums of squares carry their factors in the squared standard error from the start: every pass over a tile counts.
    """

    chains: int
    batches: int
    draws: int
    total: Tensor
    chain: Tensor
    part: Tensor
    batch_squares: Tensor
    chain_squares: Tensor

    @property
    def factors(self) -> tuple[float, float]:
        """Of squared deviations of batches from their chain's mean, and of chains from the mean of all (1 chain: no matter what)."""
        every = (self.chains * self.draws) ** 2
        return self.batches / (self.batches - 1) / every, self.chains / max(1, self.chains - 1) / every

    def add(self, x: Tensor, f: Tensor, delta: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """All chains and batches of x (chain, batch, row, train), f (chain, batch, row, query); delta: -cor / 2 and sums of squares."""
        of_batch, of_chain = self.factors
        self.total.zero_(), self.batch_squares.zero_(), self.chain_squares.zero_()
        for c in range(self.chains):
            for b in range(self.batches):
                out = self.part if b else self.chain
                torch.mm(f[c, b].T, x[c, b], out=out)
                if delta is not None:
                    half, x_squares, f_squares = delta
                    out.addcmul_(half, x_squares[c, b][None]).addcmul_(half, f_squares[c, b][:, None])
                self.batch_squares.addcmul_(out, out, value=of_batch)
                if b:
                    self.chain.add_(self.part)
            self.chain_squares.addcmul_(self.chain, self.chain, value=of_chain)
            self.total.add_(self.chain)

    def stderr(self, out: Tensor) -> None:
        """The larger of both into out (query, train); the sums are used up."""
        of_batch, of_chain = self.factors
        squared = self.batch_squares.sub_(self.chain_squares, alpha=of_batch / of_chain / self.batches)
        if self.chains > 1:
            between = self.chain_squares.addcmul_(self.total, self.total, value=-of_chain / self.chains)
            squared = torch.maximum(squared, between, out=squared)
        torch.sqrt(squared.clamp_(min=0), out=out)
