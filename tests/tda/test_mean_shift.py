"""Mean shifts by hand, and where the truth is a sum of effects."""

import numpy as np
import pytest

from tda import InputError
from tda.evaluation.lds import lds
from tda.evaluation.mean_shift import mean_shift
from tda.evaluation.subsets import masks
from tda.methods import parse
from tda.modules import inspect
from tests.tda.test_exactness import classes


def test_four_examples_by_hand():
    chosen = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    measured = np.array([[[1.0], [3.0]], [[4.0], [4.0]], [[7.0], [5.0]], [[9.0], [7.0]]])  # means 2, 4, 6, 8
    assert mean_shift(chosen, measured)[0] == pytest.approx([3 - 7, 4 - 6, 6 - 2, 8 - 4])


def test_an_effect_that_adds_up_is_found_in_order_as_subsets_grow_many():
    random = np.random.default_rng(0)
    effects, chosen = random.normal(size=(3, 20)), masks(20, 0.5, 4000, 1)
    found = mean_shift(chosen, (chosen @ effects.T)[:, None])
    # Of subsets of one size, having one example is lacking another: the shift is the effect less the others' mean.
    wanted = (effects - effects.mean(1, keepdims=True)) * 20 / 19
    assert np.abs(found - wanted).max() < 0.3
    fresh = masks(20, 0.5, 100, 2)
    assert lds(found, fresh, (fresh @ effects.T)[:, None]).min() > 0.98


def test_an_example_that_is_always_there_is_named():
    chosen = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 0]], bool)
    with pytest.raises(InputError, match=r"training example 0 is in all of the 3 subsets.*take more subsets"):
        mean_shift(chosen, np.zeros((3, 1, 2)))


def test_a_problem_that_cannot_train_is_refused():
    problem = classes()
    with pytest.raises(InputError, match="dtda retrains the model, and Given has neither fit nor recipe"):
        parse({"name": "dtda"}).check(inspect(problem, problem.given, problem.train))
