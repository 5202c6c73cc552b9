"""Many models trained at once have the numbers of each trained alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import tda
from tda.evaluation.retraining import measure, retrain, retrained
from tda.problems.digits import Digits, DigitsCNN, PaperDigits
from tda.recipe import load_all
from tda.stacked import fit_stack, unstackable
from tda.stacked_mlp import mlp_gradients

RECIPE = tda.Recipe(epochs=3, batch_size=8, learning_rate=0.1, momentum=0.9, weight_decay=1e-2)


class Small(tda.Problem):
    """A problem made of what a test gives it."""

    def __init__(self, make, likelihood=None, recipe=RECIPE, outputs=3):
        self.make, self.likelihood, self.given, self.outputs = make, likelihood or tda.Categorical(), recipe, outputs

    def model(self):
        return self.make()

    def recipe(self):
        return self.given

    def train_data(self):
        random = torch.Generator().manual_seed(0)
        inputs = torch.randn(30, 4, generator=random)
        if isinstance(self.likelihood, tda.Categorical):
            return TensorDataset(inputs, torch.randint(self.outputs, (30,), generator=random))
        if isinstance(self.likelihood, tda.Bernoulli):
            return TensorDataset(inputs, torch.rand(30, self.outputs, generator=random).round())
        return TensorDataset(inputs, torch.randn(30, self.outputs, generator=random))

    def query_data(self):
        return Subset(self.train_data(), range(5))


def mlp(outputs=3, hidden=6):
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def subsets(count, size, examples=30):
    return [torch.randperm(examples, generator=torch.Generator().manual_seed(j))[:size].sort().values.tolist() for j in range(count)]


def apart(problem, ids, seeds, dtype=None):
    """Largest difference of any weight between together and alone."""
    train = problem.train_data()
    stack, found = fit_stack(problem, train, ids, seeds, dtype=dtype), 0.0
    for m, (subset, seed) in enumerate(zip(ids, seeds, strict=True)):
        alone = retrain(problem, train, subset, seed, dtype=dtype).state_dict()
        assert set(alone) == set(stack.state(m))
        found = max(found, *(float((alone[name] - value).abs().max()) for name, value in stack.state(m).items()))
    return found


PROBLEMS = {
    "mlp": lambda: Small(mlp),
    "one layer": lambda: Small(lambda: nn.Sequential(nn.Linear(4, 3))),
    "deep": lambda: Small(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))),
    "many classes": lambda: Small(lambda: mlp(40), outputs=40),
    "regression": lambda: Small(mlp, tda.Gaussian()),
    "bernoulli": lambda: Small(mlp, tda.Bernoulli()),
    "plain steps": lambda: Small(mlp, recipe=tda.Recipe(2, 7, 0.1)),
    "tanh": lambda: Small(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))),
    "without a bias": lambda: Small(lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))),
    "frozen": lambda: Small(frozen),
    "layer norm": lambda: Small(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))),
}


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", PROBLEMS)
def test_models_trained_at_once_equal_those_trained_alone(name):
    problem = PROBLEMS[name]()
    assert unstackable(problem, problem.train_data()) == ""
    assert apart(problem, subsets(5, 19), [3, 1, 4, 1, 5], torch.float64) < 1e-12
    assert apart(problem, subsets(3, 19), [3, 1, 4]) < 1e-5


@pytest.mark.parametrize("problem", [Digits(), PaperDigits(depth=2, epochs=10), Digits(width=16, depth=1, label_noise=0.3, epochs=5)])
def test_the_digits_networks_trained_at_once_in_float32_equal_those_trained_alone(problem):
    ids = subsets(6, 718, 1437)
    assert apart(problem, ids, list(range(6))) < 1e-5


def test_a_convolutional_network_is_stacked_too():
    problem = DigitsCNN(width=2, epochs=1)
    assert unstackable(problem, problem.train_data()) == ""
    assert apart(problem, subsets(2, 200, 1437), [0, 1], torch.float64) < 1e-12


@pytest.mark.parametrize(("name", "by_hand"), [("mlp", True), ("regression", True), ("tanh", False), ("frozen", False)])
def test_perceptrons_go_by_hand_and_all_else_through_autograd(name, by_hand):
    problem = PROBLEMS[name]()
    model = problem.model()
    assert (mlp_gradients(problem, model, load_all(problem, problem.train_data(), next(model.parameters()))) is not None) == by_hand


def test_a_layer_that_stands_in_two_places_is_not_taken_for_two():
    def tied():
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 3))

    problem = Small(tied)
    assert unstackable(problem, problem.train_data()) == ""
    train = problem.train_data()
    stack = fit_stack(problem, train, subsets(2, 19), [0, 1], dtype=torch.float64)
    alone = dict(retrain(problem, train, subsets(2, 19)[1], 1, dtype=torch.float64).named_parameters())
    for name, value in stack.state(1).items():
        torch.testing.assert_close(value, alone[name].detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Small(mlp, recipe=None), "has no recipe"),
        (Small(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))), "the model has buffers"),
        (Small(lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))), "torch cannot batch the model"),
        (Small(lambda: Unused(3)), "torch cannot batch the model"),
    ],
)
def test_what_cannot_be_stacked_is_told_with_the_reason(problem, reason):
    assert reason in unstackable(problem, problem.train_data())


class Unused(nn.Linear):
    """A parameter that no output depends on: alone it is left as it is, without weight decay."""

    def __init__(self, outputs):
        super().__init__(4, outputs)
        self.spare = nn.Parameter(torch.ones(2))


def test_a_fit_of_the_problems_own_is_never_replaced_by_the_recipe():
    class Own(Small):
        def fit(self, model, dataset, *, seed, on_checkpoint):
            on_checkpoint(model=model, learning_rate=0.0)

    problem = Own(mlp)
    assert "defines its own fit" in unstackable(problem, problem.train_data())


@pytest.mark.parametrize("numbers", [1 << 24, 100, 1])
def test_measurements_come_back_in_the_order_of_the_subsets_however_many_go_at_once(numbers, monkeypatch):
    monkeypatch.setattr("tda.evaluation.retraining.NUMBERS", numbers)
    problem = Small(mlp)
    train, queries = problem.train_data(), problem.query_data()
    ids = [*subsets(3, 12), *subsets(2, 19), *subsets(1, 12)]
    together = retrained(problem, train, queries, ids, [5, 4, 3, 2, 1, 0], dtype=torch.float64)
    alone = retrained(problem, train, queries, ids, [5, 4, 3, 2, 1, 0], dtype=torch.float64, stacked=False)
    assert together.shape == (6, 5)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert len(np.unique(alone[:, 0])) == 6


def test_retraining_leaves_the_global_random_numbers_alone_and_is_repeatable():
    problem = Small(mlp)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    found = [measure(problem, retrain(problem, problem.train_data(), range(10), 3), problem.query_data()) for _ in range(2)]
    fit_stack(problem, problem.train_data(), [range(10)], [3])
    assert torch.equal(*found)
    assert torch.equal(before, torch.random.get_rng_state())


def test_retraining_on_everything_is_the_runs_own_training():
    problem = Digits(epochs=1)
    torch.manual_seed(2)
    model = problem.model()
    problem.fit(model, problem.train_data(), seed=2, on_checkpoint=lambda **_: None)
    again = retrain(problem, problem.train_data(), range(1437), 2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not again.training
