"""Bayesian influence: covariances of losses along chains that sample around the checkpoint (Kreer et al. 2025)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator
from torch import Tensor

from tda.directions import Direction
from tda.errors import InputError
from tda.likelihoods import TokenCategorical
from tda.methods.method import INFLUENCE_UNIT, Method
from tda.methods.options import SaneDamping
from tda.methods.work import Fit, Made, Work
from tda.sampling.covariance import CORRELATION, covariance, series
from tda.sampling.settle import given
from tda.scoring import Directly

if TYPE_CHECKING:
    from tda.attributed import Attributed
    from tda.capture import Tape
    from tda.sampling.stored import Trajectories

#: Options that chains do not depend on.
_OF_SCORES = ("name", "label", "normalized")


def _number(value: object) -> object:
    """A number as it is compared and stored: 1 and 1.0 are one option."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Chosen = Annotated[float | Literal["auto"], BeforeValidator(_number)]


class Bif(Method):
    """influence[q, i] = -(n_beta / N) Cov(l_i(w), f_q(w)) over w ~ exp(-n_beta L(w) - (localization/2) ||w - w*||^2), within chains.

    To leading order the damped influence with damping = localization / n_beta; no gradient but the sampler's is taken. "auto": n_beta is
    N, at most 21 batches; localization and step_size follow from the curvature at the checkpoint (`tda.sampling.settle`), and from
    `damping` where one is given. What they came to is stored with the chains. normalized: the posterior correlation instead, without
    unit. tokens: losses of single tokens are stored too. compiled: steps and evaluations by compiled programs; "auto": where a group of
    chains has work for minutes and there is a compiler.
    """

    name: Literal["bif"] = "bif"
    sampler: Literal["sgld", "rmsprop"] = "sgld"
    chains: int = 4
    draws: int = 500
    burn_in: int = 500
    thinning: int = 10
    step_size: Chosen = "auto"
    n_beta: Chosen = "auto"
    localization: Chosen = "auto"
    damping: SaneDamping | None = None
    batch_size: int | Literal["full"] = 64
    normalized: bool = False
    together: int = 4
    segment: int = 100
    compiled: bool | Literal["auto"] = "auto"
    tokens: bool = False
    stochastic: ClassVar[bool] = True
    has_stderr: ClassVar[bool] = True
    has_own: ClassVar[bool] = True
    takes_gradients: ClassVar[bool] = False
    noise: ClassVar[str] = "noise and mini-batches of its chains, keyed by the run's seed and the chain; standard errors in run.stderr"

    @property
    def unit(self) -> str:  # type: ignore[override]  # of one option here, of the class elsewhere
        """Of its scores."""
        return CORRELATION if self.normalized else INFLUENCE_UNIT

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The chains."""
        options = json.loads(self.model_dump_json(exclude=set(_OF_SCORES)))
        return (Fit("chains", json.dumps(options, sort_keys=True)),)

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        given({**json.loads(self.fits[0].of), "seed": 0})
        if self.damping is not None and self.localization != "auto":
            raise ValueError(f"localization is {self.localization} and damping {self.damping}, which says the same; leave one of them out")
        if self.damping == 0:
            raise ValueError(
                "damping is 0, and nothing would hold the flat directions: give it a number above 0, or leave it out to have it chosen"
            )
        if self.chains < 2:
            raise ValueError(f"chains is {self.chains}; R-hat and standard errors compare chains: give at least 2")
        if self.draws < LEAST_DRAWS:
            raise ValueError(f"draws is {self.draws}; standard errors and R-hat need at least {LEAST_DRAWS}")
        if self.burn_in > self.draws * self.thinning:
            raise ValueError(
                f"burn_in is {self.burn_in}, past the {self.draws * self.thinning} steps of the draws (draws x thinning); "
                "lower it, or take more draws"
            )
        return self

    def check(self, attributed: Attributed) -> None:
        """InputError where tokens are asked of a model without."""
        likelihood = attributed.problem.likelihood
        if self.tokens and not isinstance(likelihood, TokenCategorical):
            raise InputError(
                f"{self.title}: tokens = true needs a loss per token, and the likelihood is {type(likelihood).__name__}; "
                "leave tokens out, or use TokenCategorical"
            )

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """None: the queries' measurements along the chains are what is kept, (query, chain, draw)."""
        ((stored,),) = work.curvature
        return Made([], kept={"measurement": stored.measurement(work.query_ids).permute(2, 0, 1).contiguous()})

    def damping_of(self, curvature: Sequence[Any]) -> float:
        """Localization / n_beta: the damping that the posterior's prior is, to leading order."""
        ((stored,),) = curvature
        return float(stored.sampling.localization / stored.sampling.n_beta)

    def direct(self, kept: Mapping[str, Tensor], fits: Sequence[Any] = ()) -> Callable[[Attributed, Tape, Sequence[int]], Directly]:
        """Covariances with the losses of a batch, their standard errors, and variances."""
        stored: Trajectories = fits[0][0]
        queries = series(kept["measurement"].permute(1, 2, 0), normalized=self.normalized)
        factor = -1.0 if self.normalized else -stored.scale

        def scores(_attributed: Attributed, _tape: Tape, ids: Sequence[int]) -> Directly:
            train = stored.train(ids).to(kept["measurement"].device)
            found, stderr = covariance(train, queries, normalized=self.normalized)
            own = train.new_full((len(ids),), -1.0) if self.normalized else factor * _variance(train)
            return Directly(factor * found, abs(factor) * stderr, own)

        return scores


def _variance(trajectories: Tensor) -> Tensor:
    """The covariance of each series of (chain, draw, series) with itself, (series,)."""
    rows = series(trajectories).rows
    return rows.square().sum((0, 1, 2)) / (len(rows) * trajectories.shape[1])


#: Two halves of a chain, and batch means within them.
LEAST_DRAWS = 16
