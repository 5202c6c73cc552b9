"""Influence with a dense curvature: the Hessian, the generalised Gauss-Newton matrix (GGN), and the GGN layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator
from torch import Tensor

from tda import flat
from tda.blocks import Block
from tda.curvature.spectrum import NEGATIVES, Inverse, Negative, Spectrum, check_memory, damping_of, inverse_values, is_psd, solve
from tda.directions import Dense, Direction, dense
from tda.methods.options import SaneDamping
from tda.methods.shortened import Shortened
from tda.methods.work import Fit, Made, Work
from tda.self_products import Own, WholeSpectra
from tda.solvers.operator import Curvature

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(value: object) -> int:
    """The number of bytes in "8GiB", "500 MB" or a number; ValueError in one line otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]|[KMGT]i)?B", value) if isinstance(value, str) else None
    if found is None or float(found[1]) <= 0:
        raise ValueError(f'memory_limit must be a number of bytes or a text such as "8GiB", got {value!r}')
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _threshold(value: object) -> object:
    # Left to Inverse, which says what a threshold is: pydantic would take true for 1 and the text "1e-4" for a number.
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"pinv must be a finite number > 0, the |eigenvalue| below which is left out, got {value!r}")
    return value


def _negative(value: object) -> object:
    if value not in NEGATIVES:
        raise ValueError(f'negative must be "drop", "abs" or "keep", got {value!r}')
    return value


def _size(value: object) -> object:
    parse_bytes(value)
    return value


class GGN(Shortened):
    """influence[q, i] = -(1/N) g_q^T f(G) g_i, with G = (1/N) sum_i J_i^T H_out,i J_i formed in full and eigendecomposed in float64.

    damping: lambda in f(s) = 1 / (s + lambda); or "heuristic", 0.1 x the mean eigenvalue. pinv: eigenvalues below it are left out; with
    `relative`, those below it x the largest. memory_limit: what the matrices may take; above, the run is refused before it starts.
    """

    name: Literal["ggn"] = "ggn"
    damping: SaneDamping = "heuristic"
    pinv: Annotated[float | None, BeforeValidator(_threshold)] = None
    relative: bool = False
    memory_limit: Annotated[int | str, BeforeValidator(_size)] = "8GiB"
    #: The matrix.
    curvature: ClassVar[Curvature] = "ggn"
    exact: ClassVar[bool] = True

    @model_validator(mode="after")
    def _inverse_is_sane(self) -> Self:
        self.inverse  # noqa: B018  (raises what is wrong)
        return self

    @property
    def inverse(self) -> Inverse:
        """What is made of the eigenvalues."""
        return Inverse(self.damping, self.pinv, self.relative, getattr(self, "negative", "drop"))

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The spectra of its matrix."""
        return (Fit("dense", self.curvature),)

    @property
    def vectors(self) -> int:
        """Gradients in float64, rotated and back."""
        return 6

    def determining(self) -> dict[str, Any]:
        """All but what the matrices may take."""
        return {name: value for name, value in super().determining().items() if name != "memory_limit"}

    def check_size(self, blocks: Sequence[Block]) -> None:
        """InputError where the matrices would take more than memory_limit; it names the bytes and the matrix-free method."""
        check_memory(blocks, self.curvature, parse_bytes(self.memory_limit))

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -V (f(s) o (V^T g_q)), solved in float64, in the model's dtype."""
        (spectra,) = work.curvature
        blocks = work.attributed.blocks
        rows = flat.flatten(blocks, [dense(gradient).double() for gradient in gradients])
        solved = solve(spectra, self._values(spectra), rows, blocks).neg_().to(work.attributed.dtype)
        return Made([[Dense(matrix) for matrix in flat.unflatten(blocks, solved)]])

    def damping_of(self, curvature: Sequence[Any]) -> list[float] | float:
        """lambda of the matrix, or of every layer's."""
        found = [damping_of(spectrum.values, self.inverse, psd=is_psd(self.curvature)) for spectrum in curvature[0]]
        return found if self.curvature == "block_ggn" else found[0]

    def own(self, curvature: Sequence[Any]) -> Own:
        """g^T f(C) g."""
        return WholeSpectra(curvature[0], self._values(curvature[0]))

    def _values(self, spectra: Sequence[Spectrum]) -> list[Tensor]:
        return [inverse_values(spectrum.values, self.inverse, psd=is_psd(self.curvature)) for spectrum in spectra]


class BlockGGN(GGN):
    """As GGN, with the matrix's entries between different layers left out; a layer's weight and bias are together.

    damping "heuristic" is 0.1 x the layer's mean eigenvalue; `relative` is relative to the layer's largest.
    """

    name: Literal["block_ggn"] = "block_ggn"  # type: ignore[assignment]
    curvature: ClassVar[Curvature] = "block_ggn"


class Hessian(GGN):
    """As GGN, with the Hessian of the mean training loss, which away from a minimum has negative eigenvalues.

    negative: "drop" leaves them out, "abs" takes 1 / (|s| + lambda), "keep" takes 1 / (s + lambda), the inverse of H + lambda I.
    "heuristic" damping and `pinv` go by |s|.
    """

    name: Literal["hessian"] = "hessian"  # type: ignore[assignment]
    negative: Annotated[Negative, BeforeValidator(_negative)] = "drop"
    curvature: ClassVar[Curvature] = "hessian"
