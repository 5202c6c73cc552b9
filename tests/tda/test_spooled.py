"""Directions in a temporary file score as those in memory, whatever parts they are made, mapped and let go in."""

import mmap
from itertools import pairwise
from typing import Any

import pytest
import torch

from tda import InputError, directions, spooled
from tda.blocks import Block
from tda.directions import Dense, Direction, Factored, count, dense, take
from tda.lowrank import shorten
from tda.modules import inspect
from tda.scoring import Scorer, score
from tests.tda.layers import LAYERS
from tests.tda.reference import problem_of

NAMES = ["Linear called twice", "Embedding tied to Linear", "Conv1d in groups"]


def drawn(blocks: tuple[Block, ...], queries: int, rank: int | None = None) -> list[Direction]:
    """Directions of random matrices, in terms where a rank is given."""
    generator = torch.Generator().manual_seed(2)
    whole = [Dense(torch.randn(queries, b.groups, b.out, b.in_, generator=generator, dtype=torch.float64)) for b in blocks]
    short = [None if rank is None else shorten(b, d, rank) for b, d in zip(blocks, whole, strict=True)]
    return [d if s is None else s.direction for d, s in zip(whole, short, strict=True)]


def pieces(whole: list[Direction], *ends: int) -> list[list[Direction]]:
    return [[take(d, slice(a, b)) for d in whole] for a, b in pairwise((0, *ends))]


def opened(name: str) -> tuple[Any, Any]:
    problem = problem_of(LAYERS[name], LAYERS[name].build())
    return inspect(problem, problem.model(), problem.train_data()), problem.train_data()


def scores(attributed: Any, train: Any, made: Any, *, cosine: bool = False) -> torch.Tensor:
    norms = torch.linspace(1, 2, 7, dtype=torch.float64)
    how: dict[str, Any] = {"examples": len(train), "batch_size": 3, "self_influence": False}
    return score(attributed, [Scorer("x", made, norms, cosine=cosine)], train, range(len(train)), **how).influence[0]


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_directions_in_memory(name: str, rank: int | None, cosine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tda.spooled.PART_BYTES", 1)
    monkeypatch.setattr("tda.spooled.PART_QUERIES", 2)
    attributed, train = opened(name)
    whole = drawn(attributed.blocks, 7, rank)
    wanted = scores(attributed, train, whole, cosine=cosine)
    assert float(wanted.abs().max()) > 0
    for limit in (1 << 30, 1):  # terms as matrices, and as terms
        for ends in ((7,), (1, 4, 7)):
            made = spooled.spooled(attributed.blocks, pieces(whole, *ends), 7, rank=rank, limit=limit)
            assert any(isinstance(each, spooled.Spooled) for each in made)
            for _ in range(2):  # what was let go is there again
                found = scores(attributed, train, made, cosine=cosine)
                torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))


def test_passes_share_a_file_and_terms_of_fewer_ranks_are_filled_up() -> None:
    block = Block("layer", "linear", "linear", "kronecker", 1, 30, 40, "weight", None, ((30, 40),), positions=64)
    whole = [Factored(torch.randn(5, rank, 1, 30), torch.randn(5, rank, 1, 40)) for rank in (9, 8)]
    parts = [[take(d, slice(2)) for d in whole], [take(d, slice(2, 5)) for d in reversed(whole)]]
    for limit in (1 << 30, 1):
        made = spooled.spooled([block], parts, 5, rank=10, limit=limit)
        for p, (first, second) in enumerate(zip(*parts, strict=True)):
            assert isinstance(made[p], spooled.Spooled)
            assert made[p].rank == (None if limit > 1 else 10)
            found = torch.cat([dense(part) for part in made[p].parts()])
            torch.testing.assert_close(found, torch.cat([dense(first), dense(second)]))


def test_terms_that_rows_meet_one_by_one_stay_in_memory() -> None:
    block = Block("layer", "linear", "linear", "kronecker", 1, 30, 40, "weight", None, ((30, 40),))
    one = Factored(torch.randn(5, 1, 1, 30), torch.randn(5, 1, 1, 40))
    (made,) = spooled.spooled([block], [[take(one, slice(3))], [take(one, slice(3, 5))]], 5)
    assert isinstance(made, Factored)
    assert torch.equal(made.left, one.left)


@pytest.mark.parametrize("later", ["terms", "matrices"])
def test_queries_of_many_terms_after_those_of_few_all_go_to_the_file(later: str) -> None:
    block = Block("layer", "linear", "linear", "kronecker", 1, 30, 40, "weight", None, ((30, 40),))
    few, many = (Factored(torch.randn(n, rank, 1, 30), torch.randn(n, rank, 1, 40)) for n, rank in ((3, 2), (2, 25)))
    parts = [few, many if later == "terms" else Dense(dense(many)), few]
    (made,) = spooled.spooled([block], [[part] for part in parts], 8)
    assert isinstance(made, spooled.Spooled)
    torch.testing.assert_close(torch.cat([dense(part) for part in made.parts()]), torch.cat([dense(part) for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_keep_their_bits(dtype: torch.dtype) -> None:
    block = Block("layer", "linear", "linear", "kronecker", 2, 3, 5, "weight", None, ((6, 5),))
    matrix = torch.randn(9, 2, 3, 5).to(dtype)
    (made,) = spooled.spooled([block], [[Dense(matrix[:4])], [Dense(matrix[4:])]], 9)
    assert isinstance(made, spooled.Spooled)
    assert torch.equal(torch.cat([dense(part) for part in made.parts()]), matrix)


def test_memory_holds_a_part_at_a_time() -> None:
    """Resident memory of this process, while 96 MiB that came in parts of 8 are read."""

    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * mmap.PAGESIZE

    block = Block("layer", "linear", "linear", "kronecker", 1, 1024, 256, "weight", None, ((1024, 256),), positions=64)
    one = Dense(torch.ones(8, 1, 1024, 256))
    (made,) = spooled.spooled([block], ([one] for _ in range(12)), 96)
    assert isinstance(made, spooled.Spooled)
    before, most, total = resident(), 0, 0.0
    for part in made.parts():
        total += float(dense(part).sum())
        most = max(most, resident())
        assert count(part) <= spooled.PART_BYTES >> 20
    assert total == 96 * 1024 * 256
    assert most - before < spooled.PART_BYTES + (16 << 20)
    assert resident() - before < 16 << 20


def test_a_folder_without_room_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    block = Block("layer", "linear", "linear", "kronecker", 1, 3, 5, "weight", None, ((3, 5),))
    with pytest.raises(InputError, match=r"No space left on device.*let \$TMPDIR name a folder with room for them, or lower query_block"):
        spooled.spooled([block], [[Dense(torch.ones(2, 1, 3, 5))]], 2)
    assert directions.SPOOL_BYTES > directions.HELD_BYTES
