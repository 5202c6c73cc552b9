"""Directions of low rank: as good as the best of their rank, with the error that is stated, and scored as what they stand for."""

from itertools import pairwise

import pytest
import torch

from tda import InputError, directions, lowrank, sizes
from tda.blocks import Block
from tda.curvature.fit import fit_factors
from tda.directions import Dense, Factored, count, dense, extend, held, query_gradients, take
from tda.methods import parse
from tda.methods.sweep import ranked
from tda.methods.work import Work
from tda.modules import inspect
from tda.scoring import Scorer, score
from tests.tda.layers import LAYERS
from tests.tda.reference import problem_of

WIDE = (40, 70)  # decomposed by a sketch at low ranks
NARROW = (9, 12)


def matrices(shape, *, decay=0.9, queries=3, groups=2):
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(queries, groups, n, min(shape), generator=generator, dtype=torch.float64)).Q for n in shape)
    return (u * decay ** torch.arange(min(shape))) @ v.mT


def relative(error, whole):
    return float(error.norm() / whole.norm())


@pytest.mark.parametrize("shape", [WIDE, WIDE[::-1], NARROW])
def test_terms_are_about_as_good_as_the_best_of_their_rank_and_their_error_is_what_is_stated(shape):
    matrix = matrices(shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 2, 5, 8):
        short = lowrank.low_rank(matrix, rank)
        best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
        errors = (dense(short.direction) - matrix).flatten(1).norm(dim=1) / matrix.flatten(1).norm(dim=1)
        assert short.direction.rank == rank
        torch.testing.assert_close(short.error, errors, rtol=1e-8, atol=0)
        assert float(errors.max()) <= 1.02 * float(((best - matrix).flatten(1).norm(dim=1) / matrix.flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize("rank", [4, 8])
def test_what_has_that_rank_is_kept_to_rounding(rank):
    u, s, vh = torch.linalg.svd(matrices(WIDE), full_matrices=False)
    matrix = (u[..., :4] * s[..., None, :4]) @ vh[..., :4, :]
    assert relative(dense(lowrank.low_rank(matrix, rank).direction) - matrix, matrix) < 1e-10


def test_the_error_falls_as_the_rank_grows_and_a_zero_matrix_has_none():
    errors = [lowrank.low_rank(matrices(WIDE), rank).error for rank in (1, 4, 16, 39)]
    assert all(bool((b < a).all()) for a, b in pairwise(errors))
    assert float(lowrank.low_rank(torch.zeros(2, 1, *WIDE), 3).error.abs().max()) == 0


def test_weights_move_the_error_to_where_it_weighs_little():
    matrix, scale = matrices(WIDE, groups=1), torch.logspace(0, -2, WIDE[0], dtype=torch.float64)[None]
    plain, weighed = (dense(lowrank.low_rank(matrix, 4, by).direction) for by in (None, scale))
    lost = [relative((each - matrix) * scale[..., None], matrix * scale[..., None]) for each in (plain, weighed)]
    assert lost[1] < 0.8 * lost[0]


def test_a_querys_terms_do_not_depend_on_the_other_queries():
    matrix = matrices(WIDE)
    alone, together = (dense(lowrank.low_rank(some, 5).direction) for some in (matrix[1:2], matrix))
    torch.testing.assert_close(alone[0], together[1], rtol=1e-11, atol=1e-12)


def made(name, rank, monkeypatch, **options):
    """Directions of EK-FAC on a model of layers, in float64, and what they are made from."""
    monkeypatch.setattr(lowrank, "keeps_full", lambda block, rank: rank >= min(block.out, block.in_))
    monkeypatch.setattr("tda.methods.kfac.keeps_full", lowrank.keeps_full)
    problem = problem_of(LAYERS[name], LAYERS[name].build())
    attributed, train = inspect(problem, problem.model(), problem.train_data()), problem.train_data()
    found, values = query_gradients(attributed, problem.query_data(), range(len(problem.query_data())), batch_size=4)
    factors = fit_factors(attributed, train, fisher="empirical", batch_size=4)
    method = parse({"name": "ekfac", "fisher": "empirical", "damping": 1e-3, **options, **({"query_rank": rank} if rank else {})})
    return attributed, train, values, method.directions(Work(attributed, train, [factors], 0, 4), found)


@pytest.mark.parametrize("name", ["Linear", "Linear called twice", "Embedding", "Embedding tied to Linear", "Conv1d in groups", "GPT-2"])
def test_full_rank_gives_the_full_scores_and_a_low_one_those_of_the_matrices_that_it_stands_for(name, monkeypatch):
    attributed, train, values, whole = made(name, None, monkeypatch)
    how = {"examples": len(train), "batch_size": 3, "self_influence": False}

    def scores(directions):
        return score(attributed, [Scorer("x", directions, torch.ones_like(values))], train, range(len(train)), **how).influence[0]

    full = scores(whole.passes[0])
    most = max(min(block.out, block.in_) for block in attributed.blocks)
    torch.testing.assert_close(scores(made(name, most, monkeypatch)[3].passes[0]), full, rtol=1e-10, atol=1e-10 * float(full.abs().max()))
    low = made(name, 2, monkeypatch)[3]
    assert any(isinstance(direction, Factored) for direction in low.passes[0])
    wanted = scores([Dense(dense(direction)) for direction in low.passes[0]])
    assert relative(wanted - full, full) > 1e-6, "a low rank that loses nothing proves nothing"
    ways = {"by terms": True, "as matrices": False}
    for way, terms in ways.items():
        monkeypatch.setattr(directions, "by_terms", lambda *_, terms=terms: terms)
        monkeypatch.setattr(directions, "MATRIX_BYTES", 1)
        torch.testing.assert_close(scores(low.passes[0]), wanted, rtol=1e-10, atol=1e-12 * float(full.abs().max()), msg=way)
    once = held(attributed.blocks, low.passes[0])
    torch.testing.assert_close(scores(once), wanted, rtol=1e-10, atol=1e-12 * float(full.abs().max()))
    assert held(attributed.blocks, low.passes[0], 1) == low.passes[0]


@pytest.mark.parametrize("name", ["graddot", "cg"])
def test_methods_without_terms_of_their_own_are_shortened_when_they_are_stored(name):
    block = inspect(*_linear()).blocks[0]
    assert lowrank.shorten(block, Dense(matrices((block.out, block.in_), groups=1)), 99) is None
    assert parse({"name": name, "query_rank": 2}).rank == 2
    assert "query_rank" not in parse({"name": name}).determining(), "full directions have the fingerprints that they had"


def _linear():
    problem = problem_of(LAYERS["Linear"], LAYERS["Linear"].build())
    return problem, problem.model(), problem.train_data()


def test_what_is_told_of_groups_of_queries_is_over_all():
    blocks = inspect(*_linear()).blocks
    first, second = torch.tensor([0.1, 0.1]), torch.tensor([0.55])
    told = [lowrank.stated(blocks, 2, [error, None]) for error in (first, second)]
    found = lowrank.together(lowrank.together(None, told[0]), told[1])
    assert found["largest"] == pytest.approx({blocks[0].name: 0.55})
    assert found["mean"] == pytest.approx({blocks[0].name: 0.25})
    assert (found["queries"], found["full"]) == (3, [blocks[1].name])
    assert lowrank.summary(found) == "rank 2; relative error of directions 0.25 on average over layers, 0.55 at most; 1 of 2 layers in full"
    assert lowrank.warnings({"ekfac": found}) == []
    assert "query_rank = 2 keeps the directions of 0 to a relative error of 0.55" in lowrank.warnings({"ekfac": told[1]})[0]


def test_ranks_that_make_no_sense_are_refused():
    for rank in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="query_rank must be a whole number of at least 1, got"):
            parse({"name": "ekfac", "query_rank": rank})
    with pytest.raises(InputError, match="approximate the same; leave one"):
        parse({"name": "ekfac", "query_rank": 2, "separable": 1e-3})
    with pytest.raises(InputError, match="unknown option 'query_rank'"):
        parse({"name": "bif", "query_rank": 2})
    with pytest.raises(InputError, match="query_rank = 4 is not for method 'multistage'"):
        ranked([{"name": "ekfac"}, {"name": "multistage"}], 4)
    assert ranked([{"name": "ekfac"}, {"name": "cg", "query_rank": 8}], 4) == [
        {"name": "ekfac", "query_rank": 4},
        {"name": "cg", "query_rank": 8},
    ]


def test_more_queries_fit_the_memory_for_directions_in_a_low_rank_and_then_share_larger_batches():
    block = Block("layer", "linear", "linear", "kronecker", 1, 1024, 257, "weight", None, ((1024, 256),), positions=128)
    assert sizes.direction_numbers([block], [None, 32]) == 1024 * 257 + 32 * (1024 + 257)
    assert sizes.direction_numbers([block], [257]) == 1024 * 257, "kept in full"
    full, short = (sizes.query_block([block] * 12, 10_000, [rank], 256, itemsize=4) for rank in (None, 32))
    assert 6 * full < short < 7 * full
    assert sizes.query_block([block] * 12, 10**6, [1], 4096, itemsize=4) == sizes.SCORE_BYTES // (2 * 4096 * 4), "scores take room too"
    assert [sizes.scoring_batch([block] * 12, 8, short, [rank], itemsize=4) for rank in (32, None)] == [32, 16]
    assert sizes.scoring_batch([block] * 12, 8, 2, [32], itemsize=4) == 8


def test_directions_that_are_read_part_by_part_are_those_of_all():
    matrix = matrices(NARROW, queries=5)
    short = lowrank.low_rank(matrix, 2).direction
    one_form, two_forms = [take(short, slice(3)), take(short, slice(3, 5))], [take(short, slice(1)), Dense(matrix[1:])]
    for parts in ([Dense(matrix[:2]), Dense(matrix[2:])], one_form, two_forms):
        whole, start = None, 0
        for part in parts:
            whole, start = extend(whole, part, start, 5), start + count(part)
        assert torch.equal(dense(whole), torch.cat([dense(part) for part in parts]))
