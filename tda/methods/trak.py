"""TRAK: a linear model of the outputs in randomly projected gradients, solved in closed form (Park et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from tda.attributed import Attributed
from tda.blocks import Block
from tda.curvature.spectrum import Inverse, Spectrum, damping_of, inverse_values
from tda.data import batches
from tda.directions import Dense, Direction
from tda.errors import InputError
from tda.flat import total
from tda.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, TokenCategorical
from tda.measurements import margin
from tda.methods.method import Method
from tda.methods.options import SaneDamping
from tda.methods.spectral import parse_bytes
from tda.methods.work import Fit, Made, Work
from tda.products import fast_float32
from tda.projection import Projection, lift, project, project_examples
from tda.self_products import Own, Projected

if TYPE_CHECKING:
    from tda.trajectory import Segment

OutputFunction = Callable[[Tensor, Tensor], Tensor]


def _size(value: object) -> object:
    parse_bytes(value)
    return value


class Trak(Method):
    """influence[q, i] = -(1/N) phi_q^T (C + lambda I)^-1 P grad l_i, C = (1/N) sum_i phi_i phi_i^T, phi_i = P grad m_i, phi_q = P grad f_q.

    m is the output function, for classes the log-odds of the example's own. Because grad l_i = -(1 - p_i) grad m_i exactly, this is TRAK's
    phi_q^T (Phi^T Phi)^-1 phi_i (1 - p_i), and inner products with gradients of the loss are all it takes.

    projection_dim: rows of P; where the model has no more parameters nothing is projected. scope: "global", one projection and one C of
    all layers; "layer", of each by itself. damping: lambda, or "heuristic": 0.1 x the mean eigenvalue of C; the paper's is 0, which
    is the pseudo-inverse here. models: checkpoints of the training, from middles of stretches of equal length, whose scores are averaged;
    1: the final one alone. Independently trained models are averaged by the run's `ensemble`. memory_limit: what the matrices of C may
    take; above, the run is refused before it starts.
    """

    name: Literal["trak"] = "trak"
    projection_dim: int = Field(default=2048, ge=1)
    scope: Literal["global", "layer"] = "global"
    damping: SaneDamping = "heuristic"
    models: int = Field(default=1, ge=1)
    memory_limit: Annotated[int | str, BeforeValidator(_size)] = "8GiB"
    stochastic: ClassVar[bool] = True
    noise: ClassVar[str] = "the random projection of the gradients, keyed by the run's seed"
    per_segment: ClassVar[int] = 1

    @property
    def meets(self) -> Literal["final", "checkpoints"]:  # type: ignore[override]
        """The final checkpoint alone, or several."""
        return "final" if self.models == 1 else "checkpoints"

    @property
    def asks(self) -> Literal["final", "checkpoints"]:  # type: ignore[override]
        """Likewise."""
        return self.meets

    @property
    def segments(self) -> int:
        """Stretches that the training is cut into."""
        return self.models

    @property
    def passes(self) -> int:
        """One per checkpoint."""
        return self.models

    @property
    def vectors(self) -> int:
        """A direction at every checkpoint, and gradients on their way."""
        return self.models + 3

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The spectrum of C at every checkpoint."""
        of = self._projection(0).name
        return tuple(Fit("projection", of, None if self.models == 1 else k) for k in range(self.models))

    def _projection(self, seed: int) -> Projection:
        return Projection(self.projection_dim, seed, self.scope == "layer")

    def determining(self) -> dict[str, Any]:
        """All options but the memory limit, which decides only whether the run starts."""
        return {name: value for name, value in super().determining().items() if name != "memory_limit"}

    def check_size(self, blocks: Sequence[Block]) -> None:
        """InputError where C would take more than memory_limit: decomposing the largest takes four matrices, using them one each."""
        parts = self._projection(0).parts(blocks)
        sizes = [8 * min(self.projection_dim, total([blocks[b] for b in part])) ** 2 for part in parts]
        needed, limit = max(4 * max(sizes), sum(sizes) + max(sizes)), parse_bytes(self.memory_limit)
        if needed > limit:
            raise InputError(
                f"{self.title}: projection_dim = {self.projection_dim} takes {needed / 2**30:.3g} GiB in dense matrices, above "
                f"memory_limit = {limit / 2**30:.3g} GiB; raise it, or project to fewer dimensions"
            )

    def check(self, attributed: Attributed) -> None:
        """InputError where the likelihood has no output function."""
        super().check(attributed)
        output_function(attributed.problem.likelihood)

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -P^T (C + lambda I)^-1 P g_q, over the number of models."""
        passes = []
        for k, spectra in enumerate(work.curvature):
            if self.models > 1:
                assert work.gradients_at is not None
                gradients = work.gradients_at(k)
            passes.append(self._pass(work, spectra, gradients))
        return Made(passes)

    def _pass(self, work: Work, spectra: Sequence[Spectrum], gradients: Sequence[Direction]) -> list[Direction]:
        blocks = work.attributed.blocks
        projection = self._projection(work.seed)
        with fast_float32():
            solved = []
            each = zip(spectra, self._inverses(spectra), project(projection, blocks, gradients), strict=True)
            for spectrum, inverse, rows in each:
                solved.append(((rows.double() @ spectrum.vectors * -inverse) @ spectrum.vectors.T).to(rows.dtype))
            return [Dense(matrix) for matrix in lift(projection, blocks, solved)]

    def _inverses(self, spectra: Sequence[Spectrum]) -> list[Tensor]:
        """1 / (s + lambda) over the number of models, for each part of the projection."""
        return [inverse_values(spectrum.values, Inverse(self.damping), psd=True) / self.models for spectrum in spectra]

    def owns(self, attributed: Attributed, curvature: Sequence[Any], segments: Sequence[Segment], seed: int) -> Sequence[Own | None]:
        """(P g)^T (C + lambda I)^-1 P g at each checkpoint."""
        del attributed, segments
        projection = self._projection(seed)
        return [Projected(projection, spectra, self._inverses(spectra)) for spectra in curvature]

    def damping_of(self, curvature: Sequence[Any]) -> list[float] | float:
        """lambda, of every layer where each has its own; the mean over models."""
        each = [[damping_of(spectrum.values, Inverse(self.damping), psd=True) for spectrum in spectra] for spectra in curvature]
        means = [sum(column) / len(column) for column in zip(*each, strict=True)]
        return means if self.scope == "layer" else means[0]


def output_function(likelihood: Likelihood) -> OutputFunction:
    """m(outputs, targets), (batch,): the number by which an example's loss depends on the weights.

    Classes: the log-odds log p / (1 - p) of the target; of several tokens or yes/no outputs their sum, in which each is as its loss has
    it. A Gaussian's single output: itself; several: the length of the residual.

    Raises InputError for a likelihood of the user's own.
    """
    if isinstance(likelihood, Categorical):
        return margin
    if isinstance(likelihood, TokenCategorical):
        return lambda outputs, targets: _token_margin(likelihood, outputs, targets)
    if isinstance(likelihood, Bernoulli):
        return lambda outputs, targets: ((2 * targets.view_as(outputs) - 1) * outputs).reshape(len(outputs), -1).sum(1)
    if isinstance(likelihood, Gaussian):
        return _residual
    raise InputError(f"trak knows no output function of the likelihood {type(likelihood).__name__}; take a method of curvature, e.g. ekfac")


def _token_margin(likelihood: TokenCategorical, outputs: Tensor, targets: Tensor) -> Tensor:
    labelled = targets != likelihood.ignore_index
    each = margin(outputs.flatten(0, 1), targets.masked_fill(~labelled, 0).flatten()).view(targets.shape)
    total = torch.where(labelled, each, 0.0).sum(1)
    return total / labelled.sum(1).clamp(min=1) if likelihood.reduction == "mean" else total


def _residual(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs[0].numel() == 1:
        return outputs.reshape(len(outputs))
    length: Tensor = torch.linalg.vector_norm((outputs - targets.view_as(outputs)).reshape(len(outputs), -1), dim=1)
    return length


def gram_sums(attributed: Attributed, dataset: Any, ids: Sequence[int], projection: Projection, *, batch_size: int) -> list[Tensor]:
    """Sums over examples `ids` of phi_i phi_i^T for each part of the projection, (k, k) float64."""
    function, sums = output_function(attributed.problem.likelihood), list[Tensor]()
    with fast_float32():
        for part in batches(ids, batch_size):
            tape = attributed.tape(attributed.load(dataset, part), part)
            features = project_examples(projection, attributed.blocks, tape.pairs(tape.seed(function)), len(part))
            each = [rows.double().T @ rows.double() for rows in features]
            sums = each if not sums else [total.add_(one) for total, one in zip(sums, each, strict=True)]
    return sums
