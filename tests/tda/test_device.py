"""Nothing that is computed on a device is left behind on another, and the numbers are the processor's."""

import pytest
import torch

from tda.modules import inspect
from tests.devices import DEVICES, TOLERANCES, apart, working_on
from tests.tda.layers import LAYERS
from tests.tda.pipeline import attribute
from tests.tda.reference import problem_of

KRONECKER = [{"name": "graddot"}, {"name": "gradcos"}, {"name": "kfac", "damping": 1e-3}, {"name": "ekfac", "fisher": "empirical"}]
CASES = [(name, fisher) for name, layer in LAYERS.items() for fisher in ("sampled", "exact") if not layer.tokens or fisher == "sampled"]


def outcome(name, fisher, device=None):
    layer = LAYERS[name]
    problem = problem_of(layer, layer.build())
    model = problem.given if device is None else problem.given.to(device)
    attributed = inspect(problem, model, problem.train)
    methods = [method | ({"fisher": fisher} if "fisher" in method or "damping" in method else {}) for method in KRONECKER]
    return attribute(problem, methods, attributed=attributed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "fisher"), CASES)
def test_factors_directions_and_scores_are_the_processors(name, fisher, device):
    wanted = outcome(name, fisher)
    with working_on(device) as there:
        found = outcome(name, fisher, there)
        assert found.attributed.device == there
        assert found.influence.device == there
        limit = TOLERANCES[device, torch.float64]
        assert apart(found.influence, wanted.influence) < limit
        assert apart(found.self_influence, wanted.self_influence) < limit
        assert apart(found.mass, wanted.mass) < limit
