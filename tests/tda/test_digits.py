"""The ready-made problems keep their numbers, and their options do what they say."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

import tda
from tda.problem import can_fit, load_problem, measurement_of
from tda.problems.digits import Digits, DigitsCNN, PaperDigits
from tda.recipe import Recipe, orders

ALL = [Digits(epochs=1), DigitsCNN(epochs=1), PaperDigits(epochs=1)]


def trained(problem, seed=0, dtype=None):
    """The model after `fit`, and what was reported on the way."""
    torch.manual_seed(seed)
    model, told = problem.model().to(dtype), []
    problem.fit(model, problem.train_data(), seed=seed, on_checkpoint=lambda **report: told.append(report))
    return model, told


def outputs(problem, model):
    images, labels = problem.query_data()[:]
    with torch.no_grad():
        return model.eval()(images), labels


def test_the_recipe_trains_as_the_loop_that_it_stands_for():
    problem = Digits(epochs=2, width=8)
    torch.manual_seed(3)
    model = problem.model()
    inputs, targets = problem.train_data()[:]
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-3)
    for _ in range(2):
        for ids in torch.randperm(1437, generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            optimizer.step()
    found = trained(problem, 3)[0].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_every_epoch_is_reported_with_its_steps_and_what_the_optimizer_does():
    _, told = trained(Digits(epochs=3, width=8))
    assert [report.pop("step") for report in told] == [23, 46, 69]
    assert all(report.pop("model") is not None for report in told)
    assert told == [{"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-3}] * 3


def test_it_can_be_trained_in_float64_too():
    assert next(trained(Digits(epochs=1), dtype=torch.float64)[0].parameters()).dtype == torch.float64


@pytest.mark.parametrize(("problem", "examples", "parameters"), [(ALL[0], 1437, 3466), (ALL[1], 1437, 3818), (ALL[2], 1617, 2410)])
def test_the_problems_have_the_sizes_that_they_state(problem, examples, parameters):
    assert len(problem.train_data()) == examples
    assert len(problem.query_data()) == 100
    assert sum(p.numel() for p in problem.model().parameters()) == parameters
    assert can_fit(problem)
    assert problem.describe("train", 0).shape == (8, 8)


@pytest.mark.parametrize("problem", [Digits(), DigitsCNN(epochs=10), PaperDigits(epochs=20)])
def test_they_learn_to_read(problem):
    scores, labels = outputs(problem, trained(problem)[0])
    assert (scores.argmax(1) == labels).float().mean() > 0.9


def test_pixels_are_standardised_on_the_training_images():
    images = PaperDigits().train_data()[:][0].double()
    spread = images.std(0, correction=0)
    torch.testing.assert_close(images.mean(0), torch.zeros(64, dtype=torch.float64), atol=1e-6, rtol=0)
    assert set(spread.round(decimals=5).tolist()) == {0.0, 1.0}
    assert Digits().train_data()[:][0].std(0, correction=0).max() < 1 + 1e-5


def test_noise_replaces_the_stated_share_of_labels_the_same_ones_every_time_and_says_which():
    clean, noisy, more = (Digits(label_noise=share) for share in (0.0, 0.3, 0.5))
    changed = noisy.train_data()[:][1] != clean.train_data()[:][1]
    np.testing.assert_array_equal(changed.numpy(), noisy.mislabelled)
    assert noisy.mislabelled.sum() == round(0.3 * 1437)
    assert not clean.mislabelled.any()
    assert (more.mislabelled | ~noisy.mislabelled).all()
    assert torch.equal(noisy.train_data()[:][1], Digits(label_noise=0.3).train_data()[:][1])
    assert torch.equal(noisy.query_data()[:][1], clean.query_data()[:][1])
    assert noisy.train_data()[:][1].unique().tolist() == list(range(10))


def test_the_margin_is_measured_where_it_is_asked_for():
    loss, margin = Digits(), Digits(measurement="margin")
    scores, labels = outputs(loss, loss.model())
    assert measurement_of(loss) == {"name": "loss", "better": "lower"}
    assert measurement_of(margin) == {"name": "margin", "better": "higher"}
    torch.testing.assert_close(loss.measurement(scores, labels), nn.functional.cross_entropy(scores, labels, reduction="none"))
    torch.testing.assert_close(margin.measurement(scores, labels), tda.margin(scores, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 361}, r"queries must be in 1\.\.360"),
        ({"queries": 0}, r"queries must be in 1\.\.360"),
        ({"label_noise": 1.5}, r"label_noise must be a share in \[0, 1\], got 1.5"),
        ({"measurement": "margins"}, 'measurement must be "loss" or "margin", got \'margins\''),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(tda.InputError, match=message):
        load_problem("tda.problems.digits:Digits", options)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 64, 0.1), "epochs is 0; it must be a whole number of at least 1"),
        ((1, 0, 0.1), "batch_size is 0"),
        ((2.5, 64, 0.1), "epochs is 2.5; it must be a whole number"),
        ((1, 64, "0.1"), "learning_rate is '0.1'; it must be a number"),
        ((1, 64, 0.0), "learning_rate is 0.0; it must be a number above 0"),
        ((1, 64, float("inf")), "learning_rate is inf"),
        ((1, 64, 0.1, 1.0), r"momentum is 1.0; it must be a number in \[0, 1\)"),
        ((1, 64, 0.1, 0.9, -1.0), "weight_decay is -1.0"),
    ],
)
def test_a_recipe_out_of_range_is_refused(numbers, message):
    with pytest.raises(tda.InputError, match=message):
        Recipe(*numbers)


def test_orders_are_permutations_that_depend_on_the_seed_alone():
    recipe = Recipe(3, 10, 0.1)
    first, again, other = (torch.stack(list(orders(recipe, 20, seed))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort(1).values, torch.arange(20).expand(3, 20))
    assert not torch.equal(first[0], first[1])


def test_the_split_is_fixed():
    images, labels = Digits().train_data()[:]
    assert hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16] == "c1281028e5251b91"
    assert images.shape == (1437, 64)
