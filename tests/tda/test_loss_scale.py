"""Layers in float16: scaled losses keep small gradients, scores keep their ranks, and an overflow is told."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from flows.config import RunConfig
from tda import Bernoulli, Categorical, capture
from tda.blocks import example_gradients
from tda.errors import InputError
from tda.loss_scale import SCALE, powers
from tda.modules import inspect
from tda.selfcheck import check_autocast
from tests.devices import SPEARMAN
from tests.tda.pipeline import Given, attribute
from tests.tda.test_autocast import layer_of


def learnt(margin=16.0, examples=6):
    """A classifier that is sure of its labels, in float32: gradients are about exp(-margin)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        model[2].weight.mul_(0.1)
        model[2].bias.copy_(torch.tensor([margin, 0.0, 0.0]))
    train = [(torch.randn(4), torch.tensor(0)) for _ in range(examples)]
    problem = Given(model, Categorical(), train, train)
    return inspect(problem, model, train)


def gradients(attributed, ids):
    """Per-example gradients (example, D)."""
    batch = attributed.load(attributed.problem.train, ids)
    tape = attributed.tape(batch, ids)
    pairs = tape.pairs(tape.seed(attributed.problem.likelihood.loss))
    return torch.cat([example_gradients(block, p).flatten(1) for block, p in zip(attributed.blocks, pairs, strict=True)], 1)


def test_ranks_of_scores_are_those_of_float32(tmp_path):
    problem, plain = layer_of("GPT-NeoX", tmp_path)
    methods = [{"name": "ekfac", "fisher": "empirical", "damping": 1e-2}, {"name": "graddot"}]
    full, short = (attribute(problem, methods, attributed=each).influence for each in (plain, replace(plain, autocast=torch.float16)))
    assert not torch.equal(full, short)
    for a, b in zip(full.flatten(0, 1), short.flatten(0, 1), strict=True):
        assert spearmanr(a, b).statistic >= SPEARMAN


def test_small_gradients_survive_and_without_the_scale_they_do_not(monkeypatch):
    plain = learnt()
    short = replace(plain, autocast=torch.float16)
    wanted = gradients(plain, range(6))
    assert 0 < float(wanted.abs().max()) < 1e-6
    apart = float((gradients(short, range(6)) - wanted).norm() / wanted.norm())
    assert apart < 0.01
    monkeypatch.setattr(capture, "powers", lambda seed, _scale: seed.new_ones(len(seed)))
    assert float((gradients(short, range(6)) - wanted).norm() / wanted.norm()) > 0.05


def test_gradients_do_not_depend_on_the_examples_beside_them():
    short = replace(learnt(), autocast=torch.float16)
    together = gradients(short, range(6))
    for i in range(6):
        assert torch.equal(gradients(short, [i])[0], together[i])


def test_outputs_may_be_one_number_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    train = [(torch.randn(4), torch.tensor(1.0)) for _ in range(5)]
    plain = inspect(Given(model, Bernoulli(), train, train), model, train)
    wanted = gradients(plain, range(5))
    assert float((gradients(replace(plain, autocast=torch.float16), range(5)) - wanted).norm() / wanted.norm()) < 0.01


def test_an_overflow_is_refused_naming_the_example_and_the_way_out():
    short = replace(learnt(), autocast=torch.float16, scale=2.0**20)
    with pytest.raises(InputError, match=r"example 3 overflow float16 .*autocast_scale = 1.04858e\+06\); lower autocast_scale.*bfloat16"):
        gradients(short, [3, 4])
    direct = replace(short, blocks=tuple(replace(block, direct=True, form="vector") for block in short.blocks))
    with pytest.raises(InputError, match="example 3 overflow float16"):
        gradients(direct, [3, 4])


@pytest.mark.parametrize("seed", [[1.0, -0.3], [1e-30, 3e-38], [0.0, 0.0], [float("nan"), 1.0], [1e30, 1.0]])
def test_powers_are_of_two_and_bring_the_largest_gradient_below_the_scale(seed):
    seed = torch.tensor([seed])
    by = powers(seed, SCALE)
    assert float(np.frexp(float(by))[0]) == 0.5
    largest = float((seed * by).abs().max())
    if float(seed.abs().max()) > 1e-25:
        assert SCALE / 2 <= largest < SCALE
    else:
        assert not largest > SCALE


def test_a_model_that_cannot_be_computed_in_float16_is_refused_in_one_line():
    class Half(nn.Linear):
        def forward(self, x):
            if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16:
                raise RuntimeError("\"some_kernel\" not implemented for 'Half'")
            return super().forward(x)

    model = nn.Sequential(Half(4, 3))
    train = [(torch.randn(4), torch.tensor(0)) for _ in range(3)]
    attributed = replace(inspect(Given(model, Categorical(), train), model, train), autocast=torch.float16)
    with pytest.raises(
        InputError, match=r'autocast = "float16": the model cannot be computed so on cpu: .*not implemented.*use "bfloat16"'
    ):
        check_autocast(attributed, attributed.load(train, [0, 1]))


def test_the_configurations_scale_is_the_librarys():
    assert RunConfig.model_fields["autocast_scale"].default == SCALE
