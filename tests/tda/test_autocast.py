"""Layers computed in bfloat16: gradients are those of that computation, and sums over them are in the model's own precision."""

from dataclasses import replace

import pytest
import torch

from tda.blocks import example_gradients, to_parameters
from tda.modules import inspect
from tests.tda import language_models as tiny
from tests.tda.layers import LAYERS
from tests.tda.pipeline import attribute
from tests.tda.reference import problem_of


def layer_of(name, folder):
    """A problem in float32, cut into blocks."""
    if name in tiny.CAUSAL:
        problem = tiny.causal(folder, name=name)
        model = tiny.drawn(tiny.CAUSAL[name], problem.model().config)
        return problem, inspect(problem, model, problem.train_data())
    problem = problem_of(LAYERS[name], LAYERS[name].build().float())
    return problem, inspect(problem, problem.model(), problem.train_data())


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "Llama", "Linear called twice", "Conv1d in groups", "Bilinear, a diagonal"])
def test_gradients_are_those_of_autograd_under_autocast_to_the_rounding_of_bfloat16(name, tmp_path):
    problem, plain = layer_of(name, tmp_path)
    short = replace(plain, autocast=torch.bfloat16)
    batch = short.load(problem.train_data(), [0])
    tape = short.tape(batch)
    assert tape.outputs.dtype == torch.float32
    pairs = list(tape.pairs(tape.seed(problem.likelihood.loss)))
    assert all(pair.left.dtype == torch.float32 for each in pairs for pair in each)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = problem.predict(short.model, batch)
    loss = problem.likelihood.loss(outputs.float(), batch.targets).sum()
    found, wanted = {}, torch.autograd.grad(loss, list(short.model.parameters()), allow_unused=True)
    for block, each in zip(short.blocks, pairs, strict=True):
        found |= to_parameters(block, example_gradients(block, each)[0])
    errors = [
        float((found[n] - g).norm() / g.norm()) for (n, _), g in zip(short.model.named_parameters(), wanted, strict=True) if n in found
    ]
    # Autograd's own sums over positions are in bfloat16.
    assert max(errors) < 0.02
    exact = list(plain.tape(batch).pairs(plain.tape(batch).seed(problem.likelihood.loss)))
    assert any(not torch.equal(a.left, b.left) for x, y in zip(exact, pairs, strict=True) for a, b in zip(x, y, strict=True))


def test_scores_are_those_of_float32_to_the_rounding_of_bfloat16(tmp_path):
    problem, plain = layer_of("GPT-NeoX", tmp_path)
    full, short = (
        attribute(problem, [{"name": "ekfac", "fisher": "empirical", "damping": 1.0}], attributed=each).influence[0]
        for each in (plain, replace(plain, autocast=torch.bfloat16))
    )
    error = float((short - full).norm() / full.norm())
    assert 1e-6 < error < 0.05
