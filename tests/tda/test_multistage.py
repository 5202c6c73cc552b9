"""A pre-training example's score is the derivative found by training every stage again with a little more of it."""

from functools import cache

import pytest
import torch
from torch import nn

import tda
from tda.carried import carry, match, shift
from tda.directions import Dense, dense
from tda.errors import InputError
from tda.methods import parse
from tda.modules import inspect
from tda.problems.digits import FewDigits
from tda.stacked import unstackable
from tests.tda.pipeline import Given, relative
from tests.tda.stages import QUERIES, Trained, derivatives, influences

PROXIMITY, DECAY = 0.3, 0.05


def data(examples, inputs, seed, classes=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, inputs, generator=g, dtype=torch.float64)
    if classes:
        teacher = torch.randn(inputs, classes, generator=g, dtype=torch.float64)
        y = (x @ teacher + torch.randn(examples, classes, generator=g, dtype=torch.float64)).argmax(1)
    else:
        y = x @ torch.randn(inputs, 1, generator=g, dtype=torch.float64) + torch.randn(examples, 1, generator=g, dtype=torch.float64)
    return list(zip(x, y, strict=True))


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Linear(4, 1, dtype=torch.float64)


def quadratics(stages):
    """Linear regressions, each pulled to the one before it; the last of the list is trained first."""
    queries = data(QUERIES, 4, 9)
    pulled = [Trained(linear(), tda.Gaussian(), data(10 + 2 * k, 4, k), queries, proximity=PROXIMITY + 0.2 * k) for k in range(stages - 1)]
    return [*pulled, Trained(linear(), tda.Gaussian(), data(40, 4, 20), queries, decay=DECAY)]


def perceptrons():
    """Two stages of a tanh perceptron, at minima that are positive definite by their penalties."""

    def model():
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    queries = data(QUERIES, 3, 9, classes=2)
    later = Trained(model(), tda.Categorical(), data(12, 3, 1, classes=2), queries, proximity=PROXIMITY)
    return [later, Trained(model(), tda.Categorical(), data(30, 3, 2, classes=2), queries, decay=DECAY)]


def method(stages=2, **options):
    table = {"problem": "any:Any", "damping": DECAY}
    for k in reversed(range(1, stages - 1)):
        table = {"problem": "any:Any", "proximity": PROXIMITY + 0.2 * k, "pretraining": table}
    solver = {"inverse": "cg", "tolerance": 1e-11, "curvature": "hessian"}
    return parse({"name": "multistage", "proximity": PROXIMITY, "pretraining": table, **solver, **options})


@cache
def truth(kind, k):
    stages = {"two": lambda: quadratics(2), "three": lambda: quadratics(3), "network": perceptrons}[kind]()
    return derivatives(stages, k)


@pytest.mark.parametrize("stage", [0, 1], ids=["fine-tuning", "pre-training"])
def test_on_a_quadratic_the_score_is_the_derivative_of_training_both_stages_again(stage):
    found = influences(quadratics(2), method())[stage]
    assert relative(found, truth("two", stage)) < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [{"second": False}, {"carried": -1.0}, {"carried": PROXIMITY}, {"examples": 8}],
    ids=["without the second inverse", "without the proximity as a factor", "with the other sign", "curvature of one batch"],
)
def test_what_has_been_published_wrongly_is_far_from_that_derivative(wrong):
    assert relative(influences(quadratics(2), method(), **wrong)[1], truth("two", 1)) > 0.2


def test_the_proximity_belongs_into_the_inverse_of_the_fine_tuned_stage():
    without = method(proximity=1e-6)
    assert relative(influences(quadratics(2), without, carried=-PROXIMITY)[1], truth("two", 1)) > 0.2


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_three_stages_pass_on_by_the_same_chain(stage):
    found = influences(quadratics(3), method(3))[stage]
    assert relative(found, truth("three", stage)) < 1e-6


@pytest.mark.parametrize("stage", [0, 1], ids=["fine-tuning", "pre-training"])
def test_on_a_small_network_at_its_minima_too(stage):
    assert relative(influences(perceptrons(), method())[stage], truth("network", stage)) < 1e-5


def test_on_a_small_network_the_second_inverse_matters():
    assert relative(influences(perceptrons(), method(), second=False)[1], truth("network", 1)) > 0.2


def test_kfac_is_exact_where_the_inputs_are_all_that_the_curvature_knows():
    # One output with unit noise: S = 1, and K-FAC's matrix is A, that is, the GGN itself.
    found = influences(quadratics(2), method(inverse="kfac", fisher="exact", tolerance=None, curvature=None))[1]
    assert relative(found, truth("two", 1)) < 1e-6


@pytest.mark.parametrize("inverse", ["ekfac", "cg", "astra"])
def test_a_second_call_gives_the_same_numbers(inverse):
    options = {"fisher": "exact", **({} if inverse != "ekfac" else {"tolerance": None, "curvature": None})}
    once, twice = (influences(quadratics(2), method(inverse=inverse, **options), calls=calls) for calls in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def heads(out, extra):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, out), *([nn.Linear(out, out)] if extra else [])).double()
    train = data(6, 3, 0, classes=out)
    return inspect(Given(model, tda.Categorical(), train), model, train)


def test_parameters_that_a_stage_lacks_are_refused_by_name_or_left_out_of_the_chain():
    later, earlier = heads(2, extra=True), heads(3, extra=False)
    with pytest.raises(InputError, match=r"only in the fine-tuned model: 2.weight, 2.bias, 3.weight, 3.bias; only in pretraining: 2"):
        match(later.blocks, earlier.blocks, "pretraining", "refuse")
    found = match(later.blocks, earlier.blocks, "pretraining", "drop")
    assert found.names == ("0.weight", "0.bias")
    assert (found.shared, found.later, found.earlier) == (16, 16 + 10 + 6, 16 + 15)
    directions = [Dense(torch.randn(2, b.groups, b.out, b.in_, dtype=torch.float64)) for b in later.blocks]
    carried = carry(later.blocks, directions, earlier.blocks, -2.0, torch.float64)
    assert torch.equal(dense(carried[0]), -2 * directions[0].matrix)
    assert not dense(carried[1]).any()


def test_stages_that_share_nothing_are_refused():
    here, there = heads(2, extra=False), inspect_other()
    with pytest.raises(InputError, match="pretraining shares no attributed parameter"):
        match(here.blocks, there.blocks, "pretraining", "drop")


def inspect_other():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).double()
    train = data(6, 3, 0, classes=2)
    return inspect(Given(model, tda.Categorical(), train), model, train)


def test_the_shift_is_relative_to_the_earlier_weights():
    earlier = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "head": torch.tensor([9.0])}
    later = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([4.0])}
    assert shift(later, earlier, ["a", "b"]) == pytest.approx(0.1)


def test_a_recipe_s_proximity_pulls_to_the_weights_that_training_starts_from():
    stage = quadratics(2)[0]
    problem, begin = Given(linear(), tda.Gaussian(), stage.train), torch.ones(5, dtype=torch.float64)
    recipe = tda.Recipe(epochs=4000, batch_size=len(stage.train), learning_rate=0.05, proximity=PROXIMITY)
    with torch.no_grad():
        problem.given.weight.copy_(begin[:4])
        problem.given.bias.copy_(begin[4:])
    problem.recipe = lambda: recipe
    problem.fit(problem.given, stage.train, seed=0, on_checkpoint=lambda **_: None)
    wanted = stage.minimum(begin, torch.zeros(len(stage.train)), begin)
    found = torch.cat([problem.given.weight.detach().flatten(), problem.given.bias.detach()])
    assert float((found - wanted).norm()) < 1e-9


def test_models_trained_many_at_once_are_pulled_as_one_alone():
    problem = FewDigits(proximity=5.0)
    assert unstackable(problem, problem.train_data()) == ""
    images, labels = zip(*problem.train_data(), strict=True)
    assert {int(label) for label in labels} == {3, 8}
    assert problem.describe("train", 0).shape == (8, 8)
    assert images[0].shape == (64,)


def test_a_recipe_with_a_negative_proximity_is_refused():
    with pytest.raises(InputError, match=r"the recipe's proximity is -1.0; it must be a number of at least 0"):
        tda.Recipe(1, 1, 0.1, proximity=-1.0)
