"""R-hat, effective sample sizes and the rest are those of plain loops, behave as they should, and the verdict names what is wrong."""

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from scipy.signal import lfilter

from tda.errors import InputError
from tda.sampling import diagnostics as module
from tda.sampling.diagnostics import diagnose, drift_of, ess, learning_coefficient, mean_and_stderr, r_hat, verdict
from tda.sampling.options import Sampling

SAMPLING = Sampling(step_size=1e-3, n_beta=100.0, localization=100.0, chains=4, draws=500, burn_in=200)


def ar1(rho, shape, seed=0):
    """Stationary AR(1) chains of variance 1, (chain, draw, k)."""
    noise = np.random.default_rng(seed).standard_normal(shape) * np.sqrt(1 - rho**2)
    noise[:, 0] /= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=1)


def scores_by_loops(chains):
    """Split in halves, and normal scores of the ranks: a list of lists of (draw,)."""
    half = len(chains[0]) // 2
    halves = [list(c[:half]) for c in chains] + [list(c[-half:]) for c in chains]
    everything = [v for c in halves for v in c]

    def rank(v):
        return sum(o < v for o in everything) + (sum(o == v for o in everything) + 1) / 2

    return [[NormalDist().inv_cdf((rank(v) - 3 / 8) / (len(everything) + 1 / 4)) for v in c] for c in halves]


def r_hat_by_loops(z):
    m, n = len(z), len(z[0])
    means = [sum(c) / n for c in z]
    within = sum(sum((v - a) ** 2 for v in c) / (n - 1) for c, a in zip(z, means, strict=True)) / m
    between = sum((a - sum(means) / m) ** 2 for a in means) / (m - 1)
    return math.sqrt(((n - 1) / n * within + between) / within)


def ess_by_loops(z):
    m, n = len(z), len(z[0])
    means = [sum(c) / n for c in z]

    def autocovariance(t):
        return sum(sum((c[k] - a) * (c[k + t] - a) for k in range(n - t)) / n for c, a in zip(z, means, strict=True)) / m

    within = autocovariance(0) * n / (n - 1)
    plus = (n - 1) / n * within + sum((a - sum(means) / m) ** 2 for a in means) / (m - 1)
    rho = [1.0] + [1 - (within - autocovariance(t)) / plus for t in range(1, n)]
    tau, last = -1.0, math.inf
    for t in range(0, n - 1, 2):
        pair = rho[t] + rho[t + 1]
        if pair <= 0:
            break
        last = min(last, pair)
        tau += 2 * last
    return m * n / max(tau, 1 / math.log10(m * n))


@pytest.mark.parametrize("draws", [40, 41])
@pytest.mark.parametrize("rho", [-0.6, 0.0, 0.7])
def test_values_are_those_of_plain_loops(rho, draws):
    x = ar1(rho, (3, draws, 2), seed=1)
    x[..., 1] = np.round(x[..., 1])  # ties
    for k in range(2):
        chains = x[..., k].tolist()
        bulk = scores_by_loops(chains)
        half = draws // 2
        middle = float(np.median([v for c in chains for v in c[:half] + c[-half:]]))
        folded = scores_by_loops([[abs(v - middle) for v in c] for c in chains])
        assert r_hat(x)[k] == pytest.approx(max(r_hat_by_loops(bulk), r_hat_by_loops(folded)), rel=1e-10)
        assert ess(x)[k] == pytest.approx(ess_by_loops(bulk), rel=1e-10)


def test_independent_draws_agree_and_count_fully():
    x = ar1(0.0, (4, 1000, 50))
    assert float(np.abs(r_hat(x) - 1).max()) < 0.01
    assert float(ess(x).mean()) == pytest.approx(4000, rel=0.05)


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_autocorrelated_draws_count_for_what_they_are_worth(rho):
    x = ar1(rho, (4, 5000, 20))
    assert float(ess(x).mean()) == pytest.approx(20_000 * (1 - rho) / (1 + rho), rel=0.1)


def test_a_chain_elsewhere_or_of_another_width_or_still_moving_is_seen():
    fine = ar1(0.3, (4, 500, 1))
    shifted, wide, moving = fine.copy(), fine.copy(), fine + np.linspace(0, 3, 500)[None, :, None]
    shifted[1] += 2
    wide[1] *= 4
    assert float(r_hat(fine)[0]) < 1.01
    assert min(float(r_hat(x)[0]) for x in (shifted, wide, moving)) > 1.1


def test_ranks_make_it_the_same_for_any_increasing_function_and_for_infinite_variance():
    x = ar1(0.4, (4, 300, 3))
    assert np.allclose(ess(np.exp(5 * x)), ess(x))
    cauchy = np.tan(np.pi * (np.random.default_rng(0).uniform(size=(4, 500, 1)) - 0.5))
    assert float(r_hat(cauchy)[0]) < 1.01


def test_many_series_are_worked_on_in_blocks(monkeypatch):
    x = ar1(0.5, (2, 60, 13))
    whole = r_hat(x), ess(x)
    monkeypatch.setattr(module, "BLOCK", 500)
    assert all(np.array_equal(a, b) for a, b in zip(whole, (r_hat(x), ess(x)), strict=True))


def test_a_constant_series_agrees_with_itself_and_one_constant_per_chain_does_not():
    x = np.zeros((3, 20, 2))
    x[:, :, 1] = np.arange(3)[:, None]
    assert r_hat(x)[0] == 1
    assert r_hat(x)[1] == math.inf
    assert ess(x)[0] == 60


def test_fewer_than_two_chains_or_four_draws_are_refused():
    with pytest.raises(InputError, match=r"^R-hat compares chains and needs at least 2, got 1; raise chains$"):
        r_hat(np.zeros((1, 10)))
    for of in (r_hat, ess):
        with pytest.raises(InputError, match="at least 4 draws per chain, got 3; raise draws"):
            of(np.zeros((2, 3)))


def test_the_learning_coefficient_of_a_quadratic_is_half_its_parameters():
    """Without localization LLC = D/2 at any temperature: L = sum w^2 / 2, w ~ N(0, 1 / n_beta)."""
    n_beta, size = 50.0, 12
    w = ar1(0.5, (6, 2000, size)) / math.sqrt(n_beta)
    llc, error = learning_coefficient((w**2).sum(2) / 2, n_beta)
    assert abs(llc - size / 2) < 3 * error < 0.3


@pytest.mark.parametrize("chains", [2, 4, 8])
def test_standard_errors_of_means_cover(chains):
    x = ar1(0.8, (chains, 500, 800))
    found = [mean_and_stderr(x[..., k]) for k in range(800)]
    assert 0.85 <= np.mean([abs(mean) <= 1.645 * error for mean, error in found]) <= 0.95


def test_drift_is_seen_where_there_is_one():
    still = 10 + ar1(0.5, (4, 400))
    drift, error = drift_of(still)
    assert abs(drift) < 3 * error
    drift, error = drift_of(still + np.linspace(0, 4, 400))
    assert drift == pytest.approx(2, abs=0.4)
    assert drift > 3 * error


def healthy(**changes):
    """Diagnostics in which nothing is wrong, with changes."""
    sampling = replace(SAMPLING, thinning=2)
    series = {
        "train loss": 1 + 0.1 * ar1(0.3, (4, 500)),
        "distance": 5 + 0.1 * ar1(0.3, (4, 500), 1),
        "example losses": ar1(0.3, (4, 500, 9), 2),
    }
    return replace(diagnose(series, sampling, parameters=10_000, bound=0.02, uncertain=0.2), **changes)


def test_a_healthy_run_has_nothing_said_against_it():
    found = healthy()
    assert verdict(found) == []
    assert found.prior_distance == pytest.approx(10.0)
    assert found.distance == pytest.approx(5.0, abs=0.02)
    assert found.llc == pytest.approx(100.0, rel=0.02)
    assert found.slowest == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"r_hat": {"distance": 1.3}, "disagreeing": {}},
            ["distance: R-hat is 1.300, above 1.05", "Raise burn_in to 400 and draws to 1000"],
        ),
        ({"ess": {"train loss": 20.0}}, ["draws of train loss are worth 20", "Raise draws to about 2500, or thinning to 10"]),
        ({"slowest": 500.0}, ["forgets in 500 steps", "burn_in is 200", "Raise burn_in to 1000"]),
        ({"slowest": 90.0}, ["= 1000 steps, is 11.1 times", "Raise thinning to 4"]),
        ({"slowest": math.inf}, ["localization is 0", "damping x n_beta"]),
        ({"bound": 0.001}, ["step_size 0.001 is not below the stability bound 0.001", "diverges", "Lower step_size to 4.8e-05"]),
        ({"bound": 0.005}, ["20% of the stability bound", "25% too large"]),
        ({"distance": 20.0}, ["20 from the checkpoint, further than the prior alone would let them, 10", "Raise localization"]),
        ({"drift": 0.5, "drift_stderr": 0.01}, ["still moving away from", "changes by +0.5", "Raise burn_in to 400"]),
        ({"uncertain": 0.95}, ["95% of the scores lie within two standard errors"]),
        ({"still": 3}, ["3 losses or measurements never moved"]),
        ({"lost": ("chain 2 step 137: the batch loss is nan",)}, ["A chain was lost", "chain 2 step 137"]),
        ({"chains": 1}, ["One chain alone", "at least 4 chains"]),
    ],
)
def test_each_fault_has_its_sentence_with_number_and_way_out(changes, parts):
    said = verdict(healthy(**changes))
    assert len(said) == (2 if changes.get("slowest") == 500.0 else 1)
    for part in parts:
        assert part in said[0]
    assert "\n" not in said[0]


def test_many_series_disagree_where_more_than_a_twentieth_of_them_do():
    x = ar1(0.3, (4, 500, 100), 2)
    x[1, :, :4] += 2
    found = diagnose({"example losses": x}, SAMPLING, parameters=10_000)
    assert found.disagreeing["example losses"] == pytest.approx(0.04)
    assert not any("disagree" in sentence for sentence in verdict(found))
    x[1, :, 4:20] += 2
    said = verdict(diagnose({"example losses": x}, SAMPLING, parameters=10_000))
    assert any("disagree on 20% of the example losses: R-hat is up to 1." in sentence for sentence in said)


def test_chains_that_agree_and_are_worth_200_draws_have_nothing_said_against_them():
    """At 1.01 this would be said of most such runs, and of nearly all with the worst of hundreds of series."""
    rho = (4 * 500 - 200) / (4 * 500 + 200)
    series = {"distance": 50 + ar1(rho, (4, 500, 40)), "train loss": 9 + ar1(rho, (4, 500, 40), 1)}
    runs = [diagnose({name: x[..., k] for name, x in series.items()}, replace(SAMPLING, thinning=2), parameters=10**6) for k in range(40)]
    assert sum(any("disagree" in sentence for sentence in verdict(found)) for found in runs) <= 4
    assert sum(max(found.r_hat.values()) > 1.01 for found in runs) > 20


def test_without_a_burn_in_one_is_asked_for():
    found = replace(healthy(), sampling=replace(SAMPLING, thinning=2, burn_in=0), r_hat={"distance": 1.3}, disagreeing={}, slowest=0.0)
    assert "Raise burn_in to 100 " in verdict(found)[0]


def test_one_chain_has_no_r_hat_and_is_told_so():
    found = diagnose({"distance": ar1(0.1, (1, 100)) + 9}, SAMPLING, parameters=10_000)
    assert math.isnan(found.r_hat["distance"])
    assert any("One chain alone" in sentence for sentence in verdict(found))


def test_without_localization_there_is_no_prior_distance_and_no_end_to_mixing():
    found = diagnose({"distance": ar1(0.1, (2, 100)) + 9}, replace(SAMPLING, localization=0.0), parameters=100)
    assert found.prior_distance == found.slowest == math.inf
    assert any("localization is 0" in sentence for sentence in verdict(found))


def test_a_series_with_a_lost_chain_is_refused():
    lost = ar1(0.1, (2, 100))
    lost[1, 50:] = np.nan
    with pytest.raises(InputError, match="series 'distance' has values that are not finite; leave lost chains out"):
        diagnose({"distance": lost}, SAMPLING, parameters=10)
    with pytest.raises(InputError, match="need a series of draws, got none"):
        diagnose({}, SAMPLING, parameters=10)
