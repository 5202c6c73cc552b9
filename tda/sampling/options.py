"""What a chain's path depends on: the sampler and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tda.errors import InputError

#: Packages differ by a factor of 2 in what they call the step size: this one's meaning, as it is stored with every run.
STEP_SIZE_CONVENTION = (
    "w <- w - (step_size/2) P [n_beta grad L_B(w) + localization (w - w*)] + sqrt(step_size P) xi, xi ~ N(0, I), L_B the batch's mean "
    "loss; P = 1 (sgld), P = 1 / (sqrt(V) + 0.1) with V <- 0.99 V + 0.01 (grad L_B)^2 (rmsprop)"
)


@dataclass(frozen=True)
class Piece:
    """Steps start..stop of every chain, which one task makes, and the draws that are kept on the way (none during the burn-in)."""

    start: int
    stop: int
    draws: range


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Chains around a checkpoint w*, targeting p(w) ~ exp(-n_beta L(w) - (localization/2) ||w - w*||^2), L the mean training loss.

    step_size, n_beta and localization are epsilon, n beta and gamma of 2509.26544; STEP_SIZE_CONVENTION says how they enter. Kept draw k
    (from 0) is taken after step burn_in + (k + 1) thinning. batch_size: examples of a step, or "full": all, in their own order.
    together: chains that one task advances at once; it changes the rounding alone. segment: kept draws between two stored states.
    compiled: whether steps and evaluations are compiled (`tda.sampling.compiled`), which changes the rounding alone, too.

    Raises:
        InputError: a number is out of its range.
    """

    step_size: float
    n_beta: float
    localization: float
    sampler: Literal["sgld", "rmsprop"] = "sgld"
    chains: int = 4
    draws: int = 500
    burn_in: int = 200
    thinning: int = 1
    batch_size: int | Literal["full"] = 64
    seed: int = 0
    together: int = 4
    segment: int = 100
    compiled: bool | Literal["auto"] = False

    def __post_init__(self) -> None:
        if self.sampler not in ("sgld", "rmsprop"):
            raise InputError(f'sampler must be "sgld" or "rmsprop", got {self.sampler!r}')
        if self.compiled not in (True, False, "auto"):
            raise InputError(f'compiled must be true, false or "auto", got {self.compiled!r}')
        above = "it must be above 0"
        _number("step_size", self.step_size, lambda value: value > 0, f"{above}; 1e-6 to 1e-4 is usual, and `tda sample --tune` chooses it")
        _number("n_beta", self.n_beta, lambda value: value > 0, f'{above}; "auto" is N, the training examples, at most 21 batches')
        _number("localization", self.localization, lambda value: value >= 0, "it must be at least 0; damping x n_beta matches a damping")
        for name in ("chains", "draws", "thinning", "together", "segment"):
            _whole(name, getattr(self, name), 1, "give a whole number of at least 1")
        _whole("burn_in", self.burn_in, 0, "give the number of steps to leave out, 0 for none")
        _whole("seed", self.seed, 0, "give a whole number of at least 0")
        if self.batch_size != "full":
            _whole("batch_size", self.batch_size, 1, 'give a whole number of at least 1, or "full"')

    @property
    def steps(self) -> int:
        """Steps of a chain, the burn-in among them."""
        return self.burn_in + self.draws * self.thinning

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The chain's steps cut where states are stored: the burn-in on its own, then `segment` draws at a time."""
        stride = self.segment * self.thinning
        found = [Piece(start, min(start + stride, self.burn_in), range(0)) for start in range(0, self.burn_in, stride)]
        for first in range(0, self.draws, self.segment):
            last = min(first + self.segment, self.draws)
            found.append(Piece(self.burn_in + first * self.thinning, self.burn_in + last * self.thinning, range(first, last)))
        return tuple(found)

    @property
    def groups(self) -> tuple[range, ...]:
        """The chains of each task."""
        return tuple(range(first, min(first + self.together, self.chains)) for first in range(0, self.chains, self.together))

    def batch(self, examples: int) -> int:
        """Examples of one step, of so many that there are.

        Raises:
            InputError: there are fewer than batch_size.
        """
        if self.batch_size == "full":
            return examples
        if self.batch_size > examples:
            raise InputError(f'batch_size is {self.batch_size}, but there are {examples} training examples; lower it or write "full"')
        return self.batch_size


def _number(name: str, value: Any, good: Callable[[float], bool], way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not good(value):
        raise InputError(f"{name} is {value!r}; {way_out}")


def _whole(name: str, value: Any, least: int, way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; {way_out}")
