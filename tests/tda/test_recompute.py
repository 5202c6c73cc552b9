"""Activation checkpointing: the same numbers, with the insides of layers computed again and not kept."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from tda.modules import inspect
from tda.recompute import recomputing, repeated_layers
from tests.tda import language_models as tiny
from tests.tda.pipeline import attribute

KINDS = {"GPT-2": {"n_layer": 2}, "GPT-NeoX": {"num_hidden_layers": 2}, "Llama": {"num_hidden_layers": 2}}
METHODS = [{"name": "ekfac", "fisher": "empirical", "damping": 1.0}]


def deep(name, folder):
    """A model of two layers in float64, cut into blocks."""
    problem = tiny.causal(folder, name=name)
    config = type(tiny.CONFIGS[name])(**{**tiny.CONFIGS[name].to_dict(), **KINDS[name]})
    config._attn_implementation = "eager"
    model = tiny.drawn(tiny.CAUSAL[name], config).double()
    return problem, inspect(problem, model, problem.train_data())


@pytest.mark.parametrize("name", KINDS)
def test_factors_and_scores_are_the_same_also_where_a_graph_is_used_many_times(name, tmp_path):
    problem, plain = deep(name, tmp_path)
    assert len(repeated_layers(plain.model)) == 2
    kept, again = (attribute(problem, METHODS, attributed=each) for each in (plain, replace(plain, recompute=True)))
    assert float(kept.influence.abs().max()) > 0
    torch.testing.assert_close(again.influence, kept.influence, rtol=1e-12, atol=1e-12 * float(kept.influence.abs().max()))
    tapes = [each.tape(each.load(problem.train_data(), range(3))) for each in (plain, replace(plain, recompute=True))]
    seed = tapes[0].seed(problem.likelihood.loss)
    for last in (False, True):
        lefts = [[pair.left for pairs in tape.pairs(seed, last=last) for pair in pairs] for tape in tapes]
        torch.testing.assert_close(lefts[1], lefts[0], rtol=1e-12, atol=1e-14)
    assert plain.model.config.use_cache, "settings are put back"
    assert not any("forward" in layer.__dict__ for layer in repeated_layers(plain.model))


def saved_bytes(attributed, batch):
    """What autograd keeps of a forward pass, each storage once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in attributed.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tape = attributed.tape(batch)
    del tape
    return sum(size for place, size in storages.items() if place not in weights)


def test_less_is_kept(tmp_path):
    problem, plain = deep("GPT-NeoX", tmp_path)
    batch = plain.load(problem.train_data(), range(5))
    kept, again = (saved_bytes(each, batch) for each in (plain, replace(plain, recompute=True)))
    assert 0 < again < 0.6 * kept


def test_a_forward_that_was_put_on_a_layer_is_used_and_stays():
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    layers.append(layers[0])
    model = nn.ModuleDict({"layers": layers})
    plain = layers[1].forward
    layers[1].forward = doubled = lambda inputs: 2 * plain(inputs)
    inputs = torch.ones(1, 2, requires_grad=True)
    wanted = layers[2](layers[1](layers[0](inputs)))
    with recomputing(model):
        torch.testing.assert_close(layers[2](layers[1](layers[0](inputs))), wanted)
        assert all(isinstance(layer.forward, partial) for layer in layers)
    assert layers[1].forward is doubled
    assert "forward" not in layers[0].__dict__, "also where a layer is used twice"


def test_layers_of_layers_are_one():
    inner = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    outer = nn.ModuleList(nn.ModuleDict({"experts": inner}) for _ in range(3))
    model = nn.ModuleDict({"layers": outer, "one": nn.ModuleList([nn.Linear(2, 2)])})
    assert repeated_layers(model) == list(outer)
    with pytest.raises(ValueError, match="on purpose"), recomputing(model):
        raise ValueError("on purpose")
    assert "forward" not in outer[0].__dict__
