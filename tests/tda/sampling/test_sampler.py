"""A step is the formula's, its options are checked, and full-batch chains have the variance that the step size predicts."""

import math

import pytest
import torch
from torch import nn

import tda
from tda.modules import inspect
from tda.sampling.batches import Batches, Noise
from tda.sampling.chains import advance, landscape, start
from tda.sampling.options import STEP_SIZE_CONVENTION, Sampling
from tests.tda.sampling.landscapes import Given, Residual, classes, mlp

NUMBERS = {"step_size": 1e-3, "n_beta": 50.0, "localization": 10.0}


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("step_size", 0.0, "above 0"),
        ("step_size", -1e-5, "above 0"),
        ("step_size", math.inf, "above 0"),
        ("n_beta", -1.0, "above 0"),
        ("n_beta", math.nan, "above 0"),
        ("localization", -1e-9, "at least 0"),
        ("chains", 0, "at least 1"),
        ("draws", 0, "at least 1"),
        ("burn_in", -1, "0 for none"),
        ("thinning", 0, "at least 1"),
        ("batch_size", 0, 'or "full"'),
        ("segment", 0, "at least 1"),
        ("together", True, "at least 1"),
        ("seed", 1.5, "at least 0"),
        ("sampler", "hmc", '"sgld" or "rmsprop"'),
    ],
)
def test_an_option_out_of_range_is_refused_in_one_line_that_names_key_value_and_way_out(key, value, way_out):
    with pytest.raises(tda.InputError) as refused:
        Sampling(**{**NUMBERS, key: value})
    message = str(refused.value)
    assert key in message
    assert repr(value) in message
    assert way_out in message
    assert "\n" not in message


def test_a_batch_larger_than_the_data_is_refused():
    problem, attributed = classes(mlp)
    with pytest.raises(tda.InputError, match="batch_size is 51, but there are 50 training examples; lower it"):
        landscape(attributed, Sampling(**NUMBERS, batch_size=51), problem.train_data())


def test_pieces_cover_every_step_and_draw_once():
    for sampling in (
        Sampling(**NUMBERS, burn_in=7, draws=11, thinning=3, segment=4),
        Sampling(**NUMBERS, burn_in=0, draws=4, segment=4),
        Sampling(**NUMBERS, burn_in=25, draws=1, thinning=5, segment=2),
    ):
        pieces = sampling.pieces
        assert [step for piece in pieces for step in range(piece.start, piece.stop)] == list(range(sampling.steps))
        assert [draw for piece in pieces for draw in piece.draws] == list(range(sampling.draws))
        for piece in pieces:
            assert len(piece.draws) <= sampling.segment
            assert all(piece.start < sampling.burn_in + (draw + 1) * sampling.thinning <= piece.stop for draw in piece.draws)
    assert [list(group) for group in Sampling(**NUMBERS, chains=5, together=2).groups] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
@pytest.mark.parametrize("make", [mlp, Residual])
def test_steps_are_the_formula(sampler, make):
    problem, attributed = classes(make, torch.float64)
    sampling = Sampling(**NUMBERS, sampler=sampler, batch_size=16, seed=3, chains=2)
    shared = landscape(attributed, sampling, problem.train_data())
    state, losses = advance(shared, start(shared, [0, 1]), 7)
    for c in range(2):
        model = make().double()
        model.load_state_dict(problem.model().state_dict())
        parameters = dict(model.named_parameters())
        home = {name: p.detach().clone() for name, p in parameters.items()}
        square = {name: torch.zeros_like(p) for name, p in parameters.items()}
        noise, batches = Noise(3, [c], shared.center), Batches(sampling, [c], shared.data)
        for step in range(7):
            ids = batches.ids(step, step + 1)[0, 0]
            loss = nn.functional.cross_entropy(model(problem.inputs[ids]), problem.targets[ids])
            torch.testing.assert_close(losses[c, step], loss.detach(), rtol=1e-12, atol=1e-12)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            xi = {name: value[0] for name, value in shared.ensemble.named(noise.at(step)).items()}
            with torch.no_grad():
                for (name, p), g in zip(parameters.items(), gradients, strict=True):
                    scale = torch.ones_like(p)
                    if sampler == "rmsprop":
                        square[name] = 0.99 * square[name] + 0.01 * g**2
                        scale = 1 / (square[name].sqrt() + 0.1)
                    drift = 50.0 * g + 10.0 * (p - home[name])
                    p.copy_(p - 1e-3 / 2 * scale * drift + (1e-3 * scale).sqrt() * xi[name])
        for name, value in shared.ensemble.named(state.weights).items():
            torch.testing.assert_close(value[c], parameters[name].detach(), rtol=1e-12, atol=1e-12)
            assert float((value[c] - home[name]).abs().max()) > 1e-3


def test_the_convention_says_half_the_step_for_the_drift_and_all_of_it_for_the_noise():
    assert "(step_size/2) P" in STEP_SIZE_CONVENTION
    assert "sqrt(step_size P)" in STEP_SIZE_CONVENTION


def test_full_batch_chains_have_the_covariance_that_their_step_size_predicts():
    """(A - h A^2 / 4)^-1, h = step_size and A = n_beta H + localization: w' = (1 - h A/2) w + sqrt(h) xi at its fixed point."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64)).Q * math.sqrt(40) * torch.tensor([1.0, 0.7, 0.4])
    design = torch.cat([basis - basis.mean(0), torch.ones(40, 1)], 1)
    targets = torch.randn(40, 1, dtype=torch.float64)
    model, best = nn.Sequential(nn.Linear(3, 1)).double(), torch.linalg.lstsq(design, targets).solution
    with torch.no_grad():
        model[0].weight.copy_(best[:3].T)
        model[0].bias.copy_(best[3])
    problem = Given(model, design[:, :3], targets, tda.Gaussian())
    curvature = 100 * design.T @ design / 40 + 20 * torch.eye(4)
    top = float(torch.linalg.eigvalsh(curvature)[-1])
    step = 3.4 / top  # stable below 4
    sampling = Sampling(
        step_size=step, n_beta=100.0, localization=20.0, batch_size="full", chains=64, together=64, draws=1500, thinning=4, burn_in=100
    )
    shared = landscape(inspect(problem, model, problem.train_data()), sampling, problem.train_data())
    drawn = []
    advance(shared, start(shared, range(64)), sampling.steps, lambda _, weights: drawn.append(weights - shared.center))
    apart = torch.cat(drawn)
    found = apart.T @ apart / len(apart)
    wanted = torch.linalg.inv(curvature - step / 4 * curvature @ curvature)
    unbiased = torch.linalg.inv(curvature)
    assert float((wanted - unbiased).norm() / unbiased.norm()) > 1  # the bias is large here ...
    assert float((found - wanted).norm() / wanted.norm()) < 0.03  # ... and it is this one
