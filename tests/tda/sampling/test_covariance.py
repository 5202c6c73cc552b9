"""Covariances are those of a plain float64 loop, at any offset, and their standard errors cover."""

import numpy as np
import pytest
import torch
from scipy.signal import lfilter

from tda.errors import InputError
from tda.sampling import covariance as module
from tda.sampling.covariance import BATCHES, Stored, covariance, covariance_blocks, series, still_series

#: Of a normal: 90% lie within so many standard deviations.
NORMAL_90 = 1.6449


def ar1(rho, shape, generator):
    """Stationary AR(1) chains of variance 1 along the last axis."""
    noise = generator.standard_normal(shape) * np.sqrt(1 - rho**2)
    noise[..., 0] /= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=-1)


def trajectories(chains=3, draws=43, train=7, query=4, *, seed=0, dtype=torch.float64):
    """Correlated draws: (chain, draw, train), (chain, draw, query)."""
    generator = np.random.default_rng(seed)
    both = ar1(0.5, (chains, train + query, draws), generator).transpose(0, 2, 1) @ generator.standard_normal(
        (train + query, train + query)
    )
    both = torch.from_numpy(both).to(dtype)
    return both[..., :train], both[..., train:]


def by_loops(x, f, batches=BATCHES, *, normalized=False):
    """Value and standard error of one pair of (chain, draw), from the definition, in float64."""
    x, f = (np.asarray(each, dtype=np.float64) for each in (x, f))
    chains, draws = x.shape
    ends = [draws * k // batches for k in range(batches + 1)]

    def parts(x, f):
        found = np.zeros((chains, batches))
        for c in range(chains):
            u, v = x[c] - x[c].mean(), f[c] - f[c].mean()
            for b in range(batches):
                a, z = ends[b], ends[b + 1]
                found[c, b] = (u[a:z] * v[a:z]).sum() + (z - a) / (batches - 1) * u[a:z].mean() * v[a:z].mean()
        return found

    p = parts(x, f)
    value = p.sum() / (chains * draws)
    if normalized:
        xx, ff = parts(x, x), parts(f, f)
        sx, sf = (np.sqrt(each.sum() / (chains * draws)) for each in (xx, ff))
        value = value / sx / sf
        p = p / sx / sf - value / 2 * (xx / sx**2 + ff / sf**2)
    within = np.sqrt(batches * p.var(1, ddof=1).sum()) / (chains * draws)
    between = p.sum(1).std(ddof=1) / draws / np.sqrt(chains) if chains > 1 else 0.0
    return value, max(within, between)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("chains", "draws"), [(3, 43), (1, 50), (8, 20)])
def test_value_and_standard_error_are_those_of_the_definition(chains, draws, normalized):
    train, query = trajectories(chains, draws)
    value, stderr = covariance(train, query, normalized=normalized)
    assert value.shape == stderr.shape == (4, 7)
    for q in range(4):
        for i in range(7):
            wanted = by_loops(train[..., i], query[..., q], normalized=normalized)
            assert (float(value[q, i]), float(stderr[q, i])) == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def test_it_does_not_depend_on_how_it_is_cut_in_tiles(monkeypatch):
    train, query = trajectories(train=11, query=9)
    for normalized in (False, True):
        whole = covariance(train, query, normalized=normalized)
        monkeypatch.setattr(module, "TILE", 2)
        monkeypatch.setattr(module, "COLUMNS", 5)
        cut = covariance(train, query, normalized=normalized)
        monkeypatch.undo()
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(whole, cut, strict=True))


def test_threads_change_nothing_and_are_given_back(monkeypatch):
    train, query = trajectories(train=40, query=9)
    monkeypatch.setattr(module, "COLUMNS", 5)
    whole, before = covariance(train, query), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        cut = covariance(train, query)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_independent_draws_have_the_covariance_of_numpy_on_average():
    """The divisor is unbiased: over 4,000 short chains the mean is right to its error, where 1/T would be 10% too small."""
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.standard_normal((1, 10, 4000)))
    value = torch.stack([covariance(x[..., i : i + 1], x[..., i : i + 1])[0][0, 0] for i in range(4000)])
    assert abs(float(value.mean()) - 1) < 3 * float(value.std()) / 4000**0.5 < 0.03


def test_as_many_batches_as_draws_give_the_divisor_one_less_than_the_draws():
    train, query = trajectories(1, 12)
    value, _ = covariance(train, query, batches=12)
    wanted = np.cov(np.concatenate([query[0], train[0]], 1).T)[:4, 4:]
    np.testing.assert_allclose(value, wanted, rtol=1e-12)


def test_float32_keeps_its_accuracy_under_an_offset_where_the_plain_formula_loses_everything():
    train, query = (x.float() + 3e3 for x in trajectories(4, 200, 30, 5, dtype=torch.float32))
    truth, error = covariance(train.double(), query.double())
    value, stderr = covariance(train, query)
    plain = torch.einsum("ctq,ctn->qn", query, train) / 800 - query.mean((0, 1))[:, None] * train.mean((0, 1))
    assert value.dtype == torch.float32
    assert float((value - truth).norm() / truth.norm()) < 1e-6
    assert float((stderr - error).norm() / error.norm()) < 1e-4
    assert float((plain - truth).norm() / truth.norm()) > 0.05


def test_chains_are_centred_one_by_one():
    """Chains that sit in different places add nothing: what is between them is no posterior covariance."""
    train, query = trajectories()
    away = torch.arange(3.0, dtype=torch.float64)[:, None, None] * 100
    assert torch.allclose(covariance(train, query)[0], covariance(train + away, query - away)[0], rtol=1e-9, atol=1e-9)


def coverage(chains, rho, *, normalized=False, runs=1500, draws=500, seed=5):
    """Share of runs in which +-1.645 stderr holds the truth, for pairs of losses: unrelated, linear, and with a second-order term."""
    truth, generator = 0.6, np.random.default_rng(seed)
    x, z = (torch.from_numpy(ar1(rho, (chains, runs, draws), generator)).transpose(1, 2).contiguous() for _ in range(2))
    f = truth * x + (1 - truth**2) ** 0.5 * z
    curved = (truth + truth**2 / 2) / (1.5 if normalized else 1)
    found = {}
    for name, (left, right, wanted) in {
        "zero": (x, z, 0.0),
        "linear": (x, f, truth),
        "curved": (x + x * x / 2, f + f * f / 2, curved),
    }.items():
        some = [slice(start, start + 30) for start in range(0, runs, 30)]
        pairs = [[each.diagonal() for each in covariance(left[..., k], right[..., k], normalized=normalized)] for k in some]
        value, stderr = (torch.cat(part) for part in zip(*pairs, strict=True))
        found[name] = float(((value - wanted).abs() <= NORMAL_90 * stderr).double().mean())
    return found


@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize("chains", [4, 8])
@pytest.mark.parametrize("normalized", [False, True])
def test_ninety_percent_intervals_cover_ninety_percent_of_autocorrelated_runs(rho, chains, normalized):
    for name, covered in coverage(chains, rho, normalized=normalized).items():
        assert 0.85 <= covered <= 0.95, (name, covered)


def test_slow_chains_are_not_biased_as_the_plain_divisor_is():
    """rho = .95: each chain's own mean takes 8% away, which no number of chains mends; here at most a third of it is left."""
    generator = np.random.default_rng(1)
    x = torch.from_numpy(ar1(0.95, (400, 1, 500), generator)).transpose(1, 2)
    plain = float(((x - x.mean(1, keepdim=True)) ** 2).sum() / (400 * 499))
    assert plain < 0.94
    assert float(covariance(x, x)[0]) > 1 - (1 - plain) / 2


@pytest.mark.parametrize("token_queries", [False, True])
def test_token_scores_sum_to_sequence_scores(token_queries):
    train, query = trajectories(3, 40, 30, 8)
    tokens, asked = train.reshape(3, 40, 6, 5), query.reshape(3, 40, 4, 2) if token_queries else query
    value, stderr = covariance(tokens, asked)
    whole, _ = covariance(tokens.sum(-1), asked.sum(-1) if token_queries else asked)
    assert value.shape == stderr.shape == ((4, 2, 6, 5) if token_queries else (8, 6, 5))
    summed = value.sum((1, 3)) if token_queries else value.sum(-1)
    assert float((summed - whole).abs().max() / whole.abs().max()) < 1e-12


def test_correlation_is_one_with_itself_and_has_no_error_there():
    train, _ = trajectories()
    value, stderr = covariance(train, 3 * train + 1, normalized=True)
    assert torch.allclose(value.diagonal(), torch.ones(7, dtype=torch.float64), atol=1e-12)
    assert float(stderr.diagonal().max()) < 1e-7
    assert float(value.abs().max()) <= 1


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3e4])
def test_a_series_that_never_moves_has_correlation_0_and_is_counted(constant):
    train, query = (x.float() for x in trajectories())
    train[..., 2] = constant
    value, stderr = covariance(train, query, normalized=True)
    assert bool((value[:, 2] == 0).all())
    assert bool((stderr[:, 2] == 0).all())
    assert still_series(train) == 1
    assert bool((value[:, [0, 1, 3, 4, 5, 6]] != 0).all())


@pytest.mark.parametrize("normalized", [False, True])
def test_blocks_from_storage_are_the_whole(normalized):
    train, query = trajectories(train=23, query=9)
    value, stderr = torch.full((9, 23), torch.nan).double(), torch.full((9, 23), torch.nan).double()
    read = []

    def from_storage(part):
        read.append(part)
        return train[..., part]

    for tile in covariance_blocks(Stored(from_storage, 23, 10), Stored(lambda part: query[..., part], 9, 5), normalized=normalized):
        value[tile.queries, tile.examples], stderr[tile.queries, tile.examples] = tile.value, tile.stderr
    wanted = covariance(train, query, normalized=normalized)
    assert torch.allclose(value, wanted[0], rtol=1e-12, atol=1e-14)
    assert torch.allclose(stderr, wanted[1], rtol=1e-9, atol=1e-12)
    assert read == [slice(0, 10), slice(10, 20), slice(20, 23)] * 2


def test_lost_chains_are_left_out_and_never_reach_a_score():
    train, query = trajectories(4)
    train[2] = torch.nan
    kept = [0, 1, 3]
    wanted, found = covariance(train[kept], query[kept]), covariance(train, query, chains=kept)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert torch.equal(covariance(train, series(query, chains=kept), chains=kept)[0], wanted[0])
    with pytest.raises(InputError, match=r"^chain 2 has draws that are not finite; leave the chain out"):
        covariance(train, query)


def test_what_cannot_be_used_is_refused():
    train, query = trajectories()
    with pytest.raises(InputError, match="3 chains x 43 draws do not belong to those of the queries, 3 x 42"):
        covariance(train, query[:, 1:])
    for ready in (series(query, batches=5), series(query, normalized=True)):
        with pytest.raises(InputError, match="other batches or normalized"):
            covariance(train, ready)
    for arguments in ({"batches": 1}, {"chains": []}):
        with pytest.raises(InputError, match="needs a chain, 2 draws and 2 batches"):
            covariance(train, query, **arguments)
    with pytest.raises(InputError, match="draws = 1"):
        covariance(train[:, :1], query[:, :1])
