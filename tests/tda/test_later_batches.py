"""What inspection found on the first examples must hold for every batch, or be refused by name; and no well-trained model is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tda import blocks as blocks_
from tda.errors import InputError
from tda.likelihoods import Categorical, Gaussian
from tda.measurements import margin
from tda.modules import inspect
from tests.tda.pipeline import Given, attribute


class Packed(nn.Module):
    """Sums a linear layer over the real tokens only, which are picked out of their batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        tokens, lengths = inputs
        keep = torch.arange(tokens.shape[1]) < lengths[:, None]
        rows = torch.tanh(self.inner(tokens[keep]))
        owner = torch.arange(len(tokens)).repeat_interleave(lengths)
        return self.outer(torch.zeros(len(tokens), 4, dtype=rows.dtype).index_add(0, owner, rows))


def padded(lengths):
    torch.manual_seed(0)
    return [((torch.randn(8, 3, dtype=torch.float64), torch.tensor(n)), torch.tensor(i % 2)) for i, n in enumerate(lengths)]


def test_packed_rows_have_their_own_gradients_also_where_the_first_examples_are_equally_long():
    torch.manual_seed(1)
    data = padded([4, 4, 2, 6, 3, 5, 8, 2])
    model = Packed().double()
    whole = attribute(Given(model, Categorical(), data, data), [{"name": "graddot"}], batch_size=8)
    alone = attribute(Given(model, Categorical(), data, data), [{"name": "graddot"}], batch_size=1)
    torch.testing.assert_close(whole.influence, alone.influence, rtol=1e-12, atol=1e-15)
    assert any("batch axis" in block.reason for block in whole.attributed.blocks)


class Branch(nn.Module):
    """Uses a second layer, and the first one otherwise, only for inputs above 1."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how = nn.Linear(2, 2), nn.Linear(2, 2), how

    def forward(self, x):
        out = self.first(x)
        if bool((x > 1).any()):
            out = out + (self.second(x) if self.how == "another" else x @ self.first.weight.T)
        return out


@pytest.mark.parametrize(("how", "name"), [("another", "second.weight"), ("otherwise", "first.weight")])
def test_a_branch_that_only_later_examples_take_is_refused_by_name(how, name):
    torch.manual_seed(2)
    data = [(torch.full((2,), 0.1 * i), torch.tensor(0)) for i in range(20)]
    with pytest.raises(InputError, match=f"some examples use {name}"):
        attribute(Given(Branch(how), Categorical(), data, data), [{"name": "graddot"}])


def confident(scale):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(4), torch.tensor(0)) for _ in range(12)]
    with torch.no_grad():
        model[2].weight.mul_(0.1)
        model[2].bias.copy_(torch.tensor([scale, 0.0, 0.0]))
    return model, data


@pytest.mark.parametrize("scale", [10.0, 16.0, 60.0])
def test_a_float32_model_that_has_learnt_its_examples_by_heart_is_attributed_like_any_other(scale):
    model, data = confident(scale)
    assert not any(block.direct for block in inspect(Given(model, Categorical(), data), model, data).blocks)


@pytest.mark.parametrize(("scale", "cosine"), [(10.0, -1.0), (60.0, -1.0), (95.0, 0.0)])
def test_cosines_of_tiny_gradients_are_cosines_and_of_denormal_ones_zero(scale, cosine):
    model, data = confident(scale)
    found = attribute(Given(model, Categorical(), data, data), [{"name": "gradcos"}], batch_size=5)
    assert found.influence.abs().max() <= 1 + 1e-3
    torch.testing.assert_close(found.influence[0].diagonal(), torch.full((12,), cosine), rtol=1e-3, atol=1e-3)


class Margin(Given):
    """A measurement with a constant of the user's own, in the model's dtype."""

    better = "higher"

    def measurement(self, outputs, targets):
        return margin(outputs @ torch.eye(3), targets)


def test_a_measurement_of_the_users_own_gets_outputs_in_the_models_dtype():
    model, data = confident(1.0)
    assert torch.isfinite(attribute(Margin(model, Categorical(), data, data), [{"name": "graddot"}]).influence).all()


class Affine(nn.Module):
    """A layer that multiplies and adds its parameters in two operations."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        return functional.linear(x, self.weight) + self.bias


def test_two_blocks_of_one_module_have_names_of_their_own():
    model = nn.Sequential(Affine())
    names = [block.name for block in inspect(Given(model, Gaussian(), []), model, [(torch.randn(3), torch.randn(2))] * 3).blocks]
    assert names == ["0.weight", "0.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused_with_the_option_that_helps(dtype):
    model = nn.Linear(3, 2).to(dtype)
    with pytest.raises(InputError, match='set dtype = "float32"'):
        inspect(Given(model, Gaussian(), []), model, [(torch.randn(3), torch.randn(2))] * 3)


def test_a_side_too_wide_for_an_eigenbasis_keeps_its_own_coordinates_and_says_so(monkeypatch):
    monkeypatch.setattr(blocks_, "WIDEST_BASIS", 7)
    model, data = confident(1.0)
    found = attribute(Given(model, Categorical(), data, data), [{"name": "ekfac", "fisher": "exact"}])
    first = found.attributed.blocks[0]
    assert (first.rotates_out, first.rotates_in) == (False, True)
    assert "too wide for an eigenbasis" in first.remark
    assert torch.isfinite(found.influence).all()


def test_without_damping_what_is_only_rounding_is_not_inverted():
    torch.manual_seed(4)
    model = nn.Linear(6, 2).double()
    flat = [(torch.cat([torch.randn(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]), torch.tensor(i % 2)) for i in range(9)]
    exact = attribute(Given(model, Categorical(), flat, flat), [{"name": "ekfac", "fisher": "exact", "damping": 0.0}])
    small = attribute(Given(model, Categorical(), flat, flat), [{"name": "ekfac", "fisher": "exact", "damping": 1e-10}])
    torch.testing.assert_close(exact.influence, small.influence, rtol=1e-5, atol=1e-8)


def test_an_example_whose_gradient_is_not_a_number_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return torch.sqrt(self.inner(x).abs())

    data = [(torch.ones(2), torch.tensor(0))] * 4 + [(torch.zeros(2), torch.tensor(0))]
    with pytest.raises(InputError, match="train example 4"):
        attribute(Given(Root(), Categorical(), data, data[:2]), [{"name": "graddot"}])
