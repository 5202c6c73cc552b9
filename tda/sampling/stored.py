"""Trajectories of completed chains as they are stored: columns of examples are read where they are asked for, a tile at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda import location, schema
from tda.errors import InputError
from tda.sampling.options import Sampling

#: What is kept in memory of one array for the next shard of the same worker; a stored chunk's examples are chosen by it.
TILE_BYTES = 64 << 20
#: What a task holds of the draws of a piece before they are stored.
PIECE_BYTES = 256 << 20


@dataclass(frozen=True)
class Trajectories:
    """The trajectories of an artifact, <store>/artifacts/trajectories/<fingerprint>, and `told`, its complete.json."""

    url: str
    told: dict[str, Any]

    @property
    def zarr(self) -> str:
        """URL of the group of the arrays."""
        return location.join(self.url, "trajectories.zarr")

    @cached_property
    def sampling(self) -> Sampling:
        """The options as they were used, every "auto" settled."""
        return Sampling(**self.told["sampling"])

    @property
    def chains(self) -> list[int]:
        """The chains that reached their end; the others were lost, and are left out of what is read here."""
        return [chain for chain in range(self.sampling.chains) if str(chain) not in self.told["lost"]]

    @property
    def examples(self) -> int:
        """N: training examples."""
        return int(self.told["examples"])

    @property
    def scale(self) -> float:
        """n_beta / N: what a covariance is multiplied with for an influence in the common unit, its sign apart."""
        return self.sampling.n_beta / self.examples

    def train(self, ids: Sequence[int]) -> Tensor:
        """l(w) - l(w*) (chain, draw, id) float32 of training examples, nats."""
        return self.columns("loss_train", ids)

    def measurement(self, ids: Sequence[int]) -> Tensor:
        """f(w) - f(w*) (chain, draw, id) float32 of queries, in units of the measurement."""
        return self.columns("measurement_query", ids)

    def columns(self, name: str, ids: Sequence[int]) -> Tensor:
        """(chain, draw, id, ...) of some examples of an array. Reads whole tiles of stored chunks, and remembers the last ones."""
        wanted = np.asarray(ids, np.int64)
        size = _tile(self.zarr, name)
        parts = [
            _read(self.zarr, name, int(tile), tuple(self.chains))[:, :, torch.from_numpy(wanted[wanted // size == tile] - tile * size)]
            for tile in np.unique(wanted // size)
        ]
        found = torch.cat(parts, 2)
        order = np.argsort(np.argsort(wanted // size, kind="stable"), kind="stable")
        return found if len(parts) == 1 else found[:, :, torch.from_numpy(order)]


def open_trajectories(url: str) -> Trajectories:
    """The trajectories of a completed artifact.

    Raises:
        InputError: it is not complete, or is gone.
    """
    try:
        told = location.read_json(location.join(url, "complete.json"))
    except FileNotFoundError as error:
        raise InputError(f"the chains of {url} are not complete, or were deleted; run the configuration again to sample them") from error
    return Trajectories(url, told)


def chunk_examples(chains: int, draws: int, tokens: int = 1) -> int:
    """Examples of a stored chunk: as many as keep a tile, all chains and draws of them, near TILE_BYTES."""
    return max(1, min(4096, TILE_BYTES // (4 * chains * draws * tokens)))


def fitting_segment(sampling: Sampling, numbers: int) -> int:
    """Kept draws of a piece: `segment`, or fewer where their values, `numbers` per draw and chain, would not stay below PIECE_BYTES.

    A function of the options and the data, so that stored chunks never depend on the machine. At least one draw is held.
    """
    together = min(sampling.together, sampling.chains)
    return max(1, min(sampling.segment, PIECE_BYTES // (4 * together * numbers)))


@lru_cache(maxsize=8)
def _tile(zarr: str, name: str) -> int:
    group: Any = location.open_group(zarr)
    schema.validate(group, [name])
    return int(group[name].chunks[2])


@lru_cache(maxsize=2)
def _read(zarr: str, name: str, tile: int, chains: tuple[int, ...]) -> Tensor:
    array: Any = location.open_group(zarr)[name]
    size = array.chunks[2]
    found = np.asarray(array[:, :, tile * size : (tile + 1) * size])
    return torch.from_numpy(np.ascontiguousarray(found[list(chains)]))
