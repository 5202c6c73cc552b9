"""Settings follow from the curvature; on a quadratic, where all is known, they do what their reasons say."""

import numpy as np
import pytest
import torch

from tda.errors import InputError
from tda.sampling.tuning import Curvature, default_n_beta, hutchinson_mean, step_size_bound, steps_to_forget, tune

VALUES = torch.logspace(-3, 1, 40, dtype=torch.float64)


def quadratic(values=VALUES, seed=0, **known):
    """A curvature with these eigenvalues in a random basis."""
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    matrix = basis @ torch.diag(values) @ basis.T
    return matrix, Curvature(lambda v: v @ matrix, size, **known)


def stationary(matrix, step_size):
    """The covariance of w <- w - (eps/2) A w + sqrt(eps) xi by iterating it, where it has one."""
    move = torch.eye(len(matrix), dtype=torch.float64) - step_size / 2 * matrix
    found = torch.zeros_like(matrix)
    term = step_size * torch.eye(len(matrix), dtype=torch.float64)
    for _ in range(40):  # doubling: the sum of move^k eps move^k, k < 2^40
        found = term
        term = term + move @ term @ move
        move = move @ move
    return found


def test_the_stiffest_direction_is_biased_by_five_percent_and_no_other_by_more():
    matrix, curvature = quadratic()
    tuned = tune(curvature, examples=1000, damping=0.01, n_beta=200.0)
    A = tuned.n_beta * matrix + tuned.localization * torch.eye(40, dtype=torch.float64)
    bias = torch.linalg.eigvalsh(A @ stationary(A, tuned.step_size)) - 1
    assert float(bias.max()) == pytest.approx(0.05, rel=0.01)
    assert float(bias.min()) > 0


def test_sigma_max_bound_and_localization_are_those_of_the_quadratic():
    _, curvature = quadratic()
    tuned = tune(curvature, examples=1000, damping=0.01, n_beta=200.0)
    assert tuned.sigma_max == pytest.approx(10.0, rel=2e-3)
    assert tuned.localization == pytest.approx(2.0)
    assert tuned.bound == pytest.approx(4 / (200 * 10 + 2), rel=2e-3) == step_size_bound(200.0, tuned.sigma_max, tuned.localization)
    assert tuned.slowest == pytest.approx(steps_to_forget(tuned.step_size, tuned.localization))


def test_above_the_bound_a_chain_diverges_and_below_it_does_not():
    A = torch.diag(torch.tensor([1.0, 50.0], dtype=torch.float64))
    bound = step_size_bound(1.0, 50.0, 0.0)
    for share, stays in ((0.99, True), (1.01, False)):
        move = (torch.eye(2, dtype=torch.float64) - share * bound / 2 * A).diagonal().abs().max()
        assert (float(move) < 1) == stays


def test_burn_in_and_draws_hold_the_slowest_direction_often_enough():
    _, curvature = quadratic(torch.linspace(0.0, 1.0, 20, dtype=torch.float64))
    tuned = tune(curvature, examples=1000, damping=0.5, draws=50)
    lost = (1 - tuned.step_size * tuned.localization / 2) ** (2 * tuned.burn_in)
    assert lost < 0.02
    assert tuned.draws == 50
    assert tuned.draws * tuned.thinning >= 20 * tuned.slowest
    assert tuned.draws * (tuned.thinning - 1) < max(50, 20 * tuned.slowest)


def test_a_chain_that_would_be_too_long_is_cut_and_the_reasons_say_so():
    _, curvature = quadratic()
    tuned = tune(curvature, examples=1000, damping=1e-4, most_steps=5000)
    assert tuned.burn_in + tuned.draws * tuned.thinning <= 5000
    assert any("more than 5000" in reason and "higher damping mixes faster" in reason for reason in tuned.reasons)


def test_the_heuristic_damping_is_a_tenth_of_the_mean_eigenvalue():
    _, curvature = quadratic()
    assert tune(curvature, examples=1000).damping == pytest.approx(0.1 * float(VALUES.mean()), rel=0.25)
    assert hutchinson_mean(curvature, 4000) == pytest.approx(float(VALUES.mean()), rel=0.02)
    _, known = quadratic(mean_eigenvalue=3.0)
    assert tune(known, examples=1000).damping == pytest.approx(0.3)


def test_a_preconditioned_chain_is_bounded_by_the_preconditioned_curvature():
    P = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 9.0, 40))
    matrix, curvature = quadratic(preconditioner=P)
    tuned = tune(curvature, examples=1000, damping=0.01, n_beta=200.0)
    A = 200.0 * matrix + 2.0 * torch.eye(40, dtype=torch.float64)
    stiffest = torch.linalg.eigvalsh(P.sqrt()[:, None] * A * P.sqrt()).max()
    assert tuned.bound == pytest.approx(4 / float(stiffest), rel=3e-3)
    assert tuned.slowest == pytest.approx(2 / (tuned.step_size * 2.0 * float(P.min())))


def test_one_everywhere_as_preconditioner_is_no_preconditioner():
    plain, scaled = (tune(quadratic(**k)[1], examples=1000, damping=0.01) for k in ({}, {"preconditioner": torch.ones(40).double()}))
    assert scaled.step_size == pytest.approx(plain.step_size, rel=2e-3)
    assert scaled.burn_in == pytest.approx(plain.burn_in, rel=5e-3)


def test_every_choice_has_its_reason():
    _, curvature = quadratic()
    said = " ".join(tune(curvature, examples=1437, batch_size=64).reasons)
    for what in ("sigma_max =", "n_beta = 1344", "damping =", "localization =", "step_size =", "Batches of 64", "thinning ="):
        assert what in said


def test_a_direction_that_curves_down_more_than_the_prior_holds_is_named():
    _, curvature = quadratic(torch.linspace(-1.0, 2.0, 20, dtype=torch.float64))
    assert any("no bump at the checkpoint" in reason for reason in tune(curvature, examples=1000, damping=0.1).reasons)
    assert not any("no bump" in reason for reason in tune(curvature, examples=1000, damping=1.1).reasons)


def test_the_default_temperature_is_n_until_batches_add_as_much_noise_as_is_wanted():
    assert default_n_beta(50_000) == 50_000
    assert default_n_beta(1000, 64) == 1000
    assert default_n_beta(100, 128) == 100
    chosen = default_n_beta(50_000, 64)
    _, curvature = quadratic()
    tuned = tune(curvature, examples=50_000, damping=1e-9, batch_size=64)
    assert tuned.n_beta == pytest.approx(chosen) == pytest.approx(21 * 64)
    assert tuned.step_size * chosen**2 * tuned.sigma_max / (4 * 64) == pytest.approx(1.0, rel=1e-3)


def test_draws_see_the_slowest_direction_as_often_as_is_asked():
    _, curvature = quadratic(torch.linspace(0.0, 1.0, 20, dtype=torch.float64))
    tuned = tune(curvature, examples=1000, damping=0.5, draws=50, times=100.0)
    assert 100 * tuned.slowest <= tuned.draws * tuned.thinning < 100 * tuned.slowest + 51


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "damping must be a finite number above 0, got 0"),
        ({"n_beta": -1.0}, "n_beta must be a finite number above 0, got -1"),
        ({"examples": 1}, "examples must be at least 2, got 1"),
        ({"draws": 1}, "draws must be at least 2, got 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        tune(quadratic()[1], **{"examples": 1000} | arguments)
    assert "\n" not in str(caught.value)


def test_a_flat_or_broken_curvature_is_refused():
    with pytest.raises(InputError, match="largest eigenvalue of the curvature is 0"):
        tune(Curvature(torch.zeros_like, 5), examples=100)
    with pytest.raises(InputError, match="largest eigenvalue of the curvature is nan"):
        tune(Curvature(lambda v: v * torch.nan, 5), examples=100)
    with pytest.raises(InputError, match="preconditioner must be positive"):
        tune(quadratic(preconditioner=torch.zeros(40))[1], examples=100)
