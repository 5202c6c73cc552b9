"""What a layer is given, as one vector per example; similarities of rows."""

import pytest
import torch
from torch import nn

from tda import Categorical, InputError
from tda.methods import parse
from tda.methods.representation import similarities
from tda.modules import inspect
from tests.tda.models import Pooled, Positions, Reused
from tests.tda.pipeline import Given, relative


def attributed(model, examples, **options):
    problem = Given(model.double(), Categorical(), examples, examples)
    return inspect(problem, problem.given, examples, **options), examples


def given(opened, name):
    """(example, features) of all examples in one batch."""
    whole, examples = opened
    block = next(block for block in whole.blocks if block.name == name)
    return whole.tape(whole.load(examples, range(len(examples)))).inputs(block)


def test_of_a_sequence_only_real_positions_are_averaged():
    torch.manual_seed(0)
    marks = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    rows = torch.randn(3, 4, 5).double()
    examples = [({"x": x, "attention_mask": mark}, torch.tensor(0)) for x, mark in zip(rows, marks, strict=True)]
    found = given(attributed(Pooled(), examples), "inner")
    wanted = torch.stack([x[mark.bool()].mean(0) for x, mark in zip(rows, marks, strict=True)])
    assert relative(found, wanted) < 1e-12


def test_of_a_convolution_patches_are_averaged():
    torch.manual_seed(0)
    images = torch.randn(4, 2, 5, 5).double()
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    found = given(attributed(model, [(image, torch.tensor(1)) for image in images]), "0")
    assert relative(found, nn.functional.unfold(images, 3).mean(2)) < 1e-12


def test_a_layer_that_is_called_twice_is_averaged_over_both_calls():
    torch.manual_seed(0)
    model, inputs = Reused(), torch.randn(5, 4).double()
    opened = attributed(model, [(x, torch.tensor(0)) for x in inputs])
    found = given(opened, next(block.name for block in opened[0].blocks if block.weight == "first.weight"))
    assert relative(found, (inputs + torch.tanh(model.first(inputs)).detach()) / 2) < 1e-12


def test_what_takes_no_rows_is_refused():
    words = attributed(Positions(), [(torch.randint(7, (4,)), torch.tensor(0))] * 3)
    assert parse({"name": "representation"}).block(words[0]).name == "out"
    with pytest.raises(InputError, match=r"layer token \(embedding\) has no rows of inputs"):
        given(words, "token")
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3))
    whole = attributed(grouped, [(torch.randn(2, 3, 3).double(), torch.tensor(0))] * 3)
    with pytest.raises(InputError, match=r"layer 0 \(conv.*\) has no rows of inputs; name a linear or convolutional layer"):
        given(whole, "0")
    with pytest.raises(InputError, match="needs layer '0' among the attributed ones; there is 2"):
        parse({"name": "representation", "layer": "0"}).block(whole[0])


@pytest.mark.parametrize("kind", ["cosine", "dot", "l2"])
def test_similarities_are_what_they_are_called(kind):
    torch.manual_seed(0)
    a, b = torch.randn(3, 6).double(), torch.randn(4, 6).double()
    each = {
        "cosine": lambda x, y: x @ y / x.norm() / y.norm(),
        "dot": lambda x, y: x @ y,
        "l2": lambda x, y: -(x - y).norm(),
    }[kind]
    assert relative(similarities(a, b, kind), torch.stack([torch.stack([each(x, y) for y in b]) for x in a])) < 1e-12


def test_rows_of_zeros_have_no_cosine_and_near_rows_keep_their_distance():
    a = torch.tensor([[0.0, 0.0], [1000.0, 1000.0]])
    assert similarities(a, a, "cosine").tolist()[0] == [0.0, 0.0]
    near = torch.tensor([[1000.0, 1000.001]])
    assert float(similarities(a[1:], near, "l2")) == pytest.approx(float(-(near - a[1:]).norm()))


def test_a_similar_example_helps_whichever_direction_is_good_news():
    from tda.methods.work import Work

    torch.manual_seed(0)
    opened, examples = attributed(nn.Sequential(nn.Linear(4, 3)), [(x, torch.tensor(0)) for x in torch.randn(5, 4).double()])
    signs = {}
    for better in ("lower", "higher"):
        opened.problem.better = better
        work = Work(opened, examples, [], 0, 2, queries=examples, query_ids=range(5))
        method = parse({"name": "representation"})
        kept = method.directions(work, []).kept
        found = method.direct(kept)(opened, opened.tape(opened.load(examples, range(5))), range(5))
        signs[better] = torch.diagonal(found).sign().tolist()
    assert signs == {"lower": [-1.0] * 5, "higher": [1.0] * 5}
