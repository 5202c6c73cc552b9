"""Convolutional networks trained many at once by gradients written out by hand have the numbers of each trained alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import tda
from tda.evaluation.retraining import retrain
from tda.problems.digits import DigitsCNN
from tda.recipe import load_all
from tda.stacked import fit_stack, unstackable
from tda.stacked_cnn import cnn_gradients
from tests.tda.test_evaluation_retraining import apart, subsets

RECIPE = tda.Recipe(epochs=3, batch_size=8, learning_rate=0.1, momentum=0.9, weight_decay=1e-2)


class Pictures(tda.Problem):
    """30 pictures of 2 channels, 6 x 5, read by the layers that a test gives."""

    def __init__(self, make, likelihood=None):
        self.make, self.likelihood = make, likelihood or tda.Categorical()

    def model(self):
        return nn.Sequential(*self.make())

    def recipe(self):
        return RECIPE

    def train_data(self):
        random = torch.Generator().manual_seed(0)
        # Halves: many values are equal, so that pooling has ties.
        inputs = (2 * torch.randn(30, 2, 6, 5, generator=random)).round() / 2
        wanted = torch.randint(3, (30,), generator=random)
        return TensorDataset(inputs, wanted if isinstance(self.likelihood, tda.Categorical) else torch.randn(30, 3, generator=random))

    def query_data(self):
        return Subset(self.train_data(), range(5))


def layers(*middle, into, first=None):
    return lambda: [first() if first else nn.Conv2d(2, 3, 3), *(make() for make in middle), nn.Flatten(), nn.Linear(into, 3)]


KNOWN = {
    "one convolution": layers(into=36),
    "a stride and padding": layers(nn.ReLU, into=27, first=lambda: nn.Conv2d(2, 3, 3, stride=(3, 2), padding=(2, 1))),
    "holes": layers(nn.ReLU, into=36, first=lambda: nn.Conv2d(2, 3, (2, 3), dilation=(2, 2), padding=(0, 1), bias=False)),
    "two convolutions": layers(nn.ReLU, lambda: nn.Conv2d(3, 4, 2, padding=1), nn.ReLU, into=80),
    "the largest": layers(nn.ReLU, lambda: nn.MaxPool2d(2), into=6),
    "the largest before the kink": layers(lambda: nn.MaxPool2d((2, 3), stride=1), nn.ReLU, into=9),
    "the mean": layers(lambda: nn.AvgPool2d(2, stride=(1, 2)), nn.ReLU, lambda: nn.Conv2d(3, 2, 1), into=6),
}


def by_hand(problem, model=None):
    model = model or problem.model()
    return cnn_gradients(problem, model, load_all(problem, problem.train_data(), next(model.parameters())))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("cached", [1, 1 << 20])
def test_convolutional_networks_trained_at_once_equal_those_trained_alone(name, cached, monkeypatch):
    monkeypatch.setattr("tda.stacked_cnn.CACHED", cached)  # one model at a time, or all
    problem = Pictures(KNOWN[name])
    assert by_hand(problem) is not None
    assert unstackable(problem, problem.train_data()) == ""
    assert apart(problem, subsets(5, 19), [3, 1, 4, 1, 5], torch.float64) < 1e-12
    assert apart(problem, subsets(3, 19), [3, 1, 4]) < 1e-5


def test_a_perceptron_on_top_and_another_loss_are_trained_at_once_too():
    def make():
        return [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)]

    problem = Pictures(make, tda.Gaussian())
    assert by_hand(problem) is not None
    assert apart(problem, subsets(3, 19), [3, 1, 4], torch.float64) < 1e-12


def test_the_digits_networks_trained_at_once_in_float32_are_those_trained_alone_to_1e_5():
    problem, ids = DigitsCNN(width=4, epochs=5), subsets(2, 718, 1437)
    train = problem.train_data()
    assert by_hand(problem) is not None
    stack = fit_stack(problem, train, ids, [0, 1])
    for m, subset in enumerate(ids):
        alone, together = (
            torch.cat([v.flatten() for v in s.values()]) for s in (retrain(problem, train, subset, m).state_dict(), stack.state(m))
        )
        assert float((alone - together).norm() / alone.norm()) < 1e-5


def frozen():
    made = KNOWN["one convolution"]()
    made[0].bias.requires_grad_(False)
    return made


@pytest.mark.parametrize(
    "make",
    [
        frozen,
        layers(nn.Tanh, into=36),
        layers(nn.ReLU, nn.ReLU, into=36),
        layers(into=60, first=lambda: nn.Conv2d(2, 2, 3, padding="same")),
        layers(into=60, first=lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
        layers(into=24, first=lambda: nn.Conv2d(2, 2, 3, groups=2)),
        layers(lambda: nn.MaxPool2d(2, padding=1), into=18),
        lambda: [nn.ReLU(), *KNOWN["one convolution"]()],
    ],
)
def test_what_is_not_written_out_goes_through_autograd_with_the_same_numbers(make):
    problem = Pictures(make)
    assert by_hand(problem) is None
    assert apart(problem, subsets(2, 19), [3, 1], torch.float64) < 1e-12


def test_a_convolution_that_stands_in_two_places_is_not_taken_for_two():
    relu, conv = nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)
    assert by_hand(Pictures(lambda: [conv, relu, conv, relu, nn.Flatten(), nn.Linear(60, 3)])) is None
    assert by_hand(Pictures(lambda: [conv, relu, nn.Conv2d(2, 2, 1), relu, nn.Flatten(), nn.Linear(60, 3)])) is not None
