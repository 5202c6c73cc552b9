"""Checkpoints come back as they were, and one that does not fit is refused by the names of its tensors."""

import pickle

import pytest
import torch
from torch import nn

from tda import InputError, checkpoint
from tests.tda.models import Head, Reused


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def refused(call, *args):
    with pytest.raises(InputError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_and_buffers_come_back_to_the_bit():
    first, second = model(0), model(1)
    first(torch.randn(8, 4))
    checkpoint.fill(second, checkpoint.parse(checkpoint.dump(first), "here"), "here")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", [Head, Reused])
def test_tied_weights_are_stored_once_and_stay_tied(kind):
    first, second = kind(), kind()
    state = checkpoint.parse(checkpoint.dump(first), "here")
    assert len(state) == len(first.state_dict()) - 1
    checkpoint.fill(second, state, "here")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert len(list(second.parameters())) == len(list(first.parameters()))


def test_dumps_and_digests_depend_on_the_weights_alone():
    assert checkpoint.dump(model()) == checkpoint.dump(model())
    a, b = (checkpoint.parse(checkpoint.dump(model(seed)), "here") for seed in (0, 1))
    assert checkpoint.digest(a) == checkpoint.digest(dict(reversed(a.items())))
    assert checkpoint.digest(a) != checkpoint.digest(b)
    assert checkpoint.digest({"w": torch.zeros(2, 3)}) != checkpoint.digest({"w": torch.zeros(3, 2)})
    assert checkpoint.digest({"w": torch.zeros(2)}) != checkpoint.digest({"w": torch.zeros(2, dtype=torch.int32)})
    checkpoint.digest({"w": torch.tensor(1.0), "empty": torch.zeros(0), "half": torch.zeros(2, dtype=torch.bfloat16)})


def test_names_and_shapes_that_differ_are_listed():
    state = checkpoint.parse(checkpoint.dump(model()), "here")
    state["head.weight"] = state.pop("2.weight")
    state["0.weight"] = torch.zeros(3, 5)
    said = refused(checkpoint.fill, model(), state, "s3://bucket/weights.safetensors")
    assert said.startswith("checkpoint s3://bucket/weights.safetensors does not fit the model: ")
    for part in ("missing: 2.weight", "unknown: head.weight", "of another shape: 0.weight (3, 5) instead of (3, 4)"):
        assert part in said


def test_long_lists_of_names_are_cut():
    said = refused(checkpoint.fill, nn.ModuleList(nn.Linear(1, 1) for _ in range(20)), {}, "here")
    assert "0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 35 more" in said


def test_a_refused_checkpoint_leaves_the_model_as_it_was():
    one = model()
    before = {k: v.clone() for k, v in one.state_dict().items()}
    state = {k: v + 1 for k, v in before.items() if k != "2.bias"}
    refused(checkpoint.fill, one, state, "here")
    assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    broken = model()
    with torch.no_grad():
        broken[2].weight[1, 1] = value
    assert "checkpoint here: 2.weight holds NaN or infinite weights" in refused(checkpoint.parse, checkpoint.dump(broken), "here")


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", pickle.dumps({"w": 1}), checkpoint.dump(model())[:-8]])
def test_bytes_that_are_not_safetensors_are_refused_and_never_unpickled(data):
    assert "checkpoint here is not a whole safetensors file" in refused(checkpoint.parse, data, "here")
