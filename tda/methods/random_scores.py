"""Random scores: what a method must beat, and what the interval of a score of nothing looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tda.directions import Direction
from tda.methods.method import Method
from tda.methods.work import Made, Work

if TYPE_CHECKING:
    from tda.attributed import Attributed
    from tda.capture import Tape

#: Numbers that one step of a Philox counter gives.
PER_STEP = 4


class Random(Method):
    """score[q, i] is standard normal: number i of the stream that (seed, q) keys, whatever the batches, shards and workers."""

    name: Literal["random"] = "random"
    stochastic: ClassVar[bool] = True
    noise: ClassVar[str] = "everything: its scores are standard normal, keyed by the run's seed, the query and the training example"
    of_weights: ClassVar[bool] = False
    takes_gradients: ClassVar[bool] = False
    unit: ClassVar[str] = "standard normal, no unit"

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """None: the queries' ids and the seed are what is kept."""
        return Made([], kept={"ids": torch.tensor(list(work.query_ids)), "seed": torch.tensor(work.seed)})

    def direct(self, kept: Mapping[str, Tensor], fits: Sequence[Any] = ()) -> Callable[[Attributed, Tape, Sequence[int]], Tensor]:
        """Normal numbers for (query, batch)."""
        seed, queries = int(kept["seed"]), kept["ids"].tolist()

        def scores(attributed: Attributed, _tape: Tape, ids: Sequence[int]) -> Tensor:
            return torch.stack([normals(seed, query, ids) for query in queries]).to(attributed.dtype)

        return scores


def normals(seed: int, query: int, ids: Sequence[int]) -> Tensor:
    """Numbers `ids` of the stream of a query: (ids,) float64. By inversion, so that each takes exactly one number of the generator."""
    wanted = np.asarray(ids, np.int64)
    start = int(wanted.min()) // PER_STEP
    stream = np.random.Philox(key=[seed & (2**64 - 1), query], counter=start).random_raw(int(wanted.max()) + 1 - start * PER_STEP)
    uniforms = ((stream[wanted - start * PER_STEP] >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    found: Tensor = torch.special.ndtri(torch.from_numpy(uniforms))
    return found
