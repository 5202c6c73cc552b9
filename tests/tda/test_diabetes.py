"""The regression problems are what they say: standardised data, an exact ridge solution, influence that predicts it."""

import numpy as np
import pytest
import torch

import tda
from tda.evaluation.lds import lds
from tda.evaluation.retraining import measure, retrain
from tda.evaluation.subsets import masks
from tda.problem import measurement_of
from tda.problems.diabetes import Diabetes, RidgeDiabetes


def matrices(problem):
    """Inputs with a column of ones, and targets: of training; inputs of the queries."""
    (x, y), (q, _) = problem.train_data().tensors, problem.query_data().tensors
    return np.c_[x.numpy(), np.ones(len(x))], y.numpy()[:, 0], np.c_[q.numpy(), np.ones(len(q))]


def test_training_data_are_standardised_and_queries_by_them():
    x, y, q = matrices(Diabetes(queries=7))
    assert x.shape == (342, 11)
    assert q.shape == (7, 11)
    np.testing.assert_allclose([x[:, :-1].mean(0), x[:, :-1].std(0)], [np.zeros(10), np.ones(10)], atol=1e-12)
    np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-12)


def test_ridge_is_the_minimum_of_its_objective():
    problem = RidgeDiabetes(penalty=0.3)
    x, y, _ = matrices(problem)
    ids = list(range(0, 342, 3))
    model = retrain(problem, problem.train_data(), ids, 0)
    w = np.append(model.weight.detach().numpy()[0], model.bias.detach().numpy())
    gradient = x[ids].T @ (x[ids] @ w - y[ids]) / len(ids) + 0.3 * w
    assert np.abs(gradient).max() < 1e-12


def test_the_exact_influence_of_ridge_predicts_retraining_on_subsets():
    problem = RidgeDiabetes(queries=30)
    x, y, q = matrices(problem)
    hessian = x.T @ x / 342 + 0.1 * np.eye(11)
    w = np.linalg.solve(hessian, x.T @ y / 342)
    influence = -q @ np.linalg.solve(hessian, ((x @ w - y)[:, None] * x).T) / 342
    subsets, queries = masks(342, 0.9, 40, 0), problem.query_data()
    retrained = [measure(problem, retrain(problem, problem.train_data(), np.flatnonzero(s).tolist(), 0), queries).numpy() for s in subsets]
    assert lds(influence, subsets, np.stack(retrained)[:, None]).min() > 0.99


def test_the_network_learns_more_than_the_mean():
    problem = Diabetes(epochs=20)
    model = retrain(problem, problem.train_data(), range(342), 0)
    assert float(measure(problem, model, problem.query_data()).mean()) < 0.35  # half the squared error of the mean is .5


@pytest.mark.parametrize("kind", [Diabetes, RidgeDiabetes])
def test_the_measurement_is_chosen(kind):
    outputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]])
    wanted = {"loss": [0.5, 4.5], "absolute_error": [1.0, 3.0], "prediction": [1.0, 2.0]}
    for name, values in wanted.items():
        problem = kind(measurement=name)
        assert problem.measurement(outputs, targets).tolist() == values
        assert measurement_of(problem)["name"] == name
    assert set(kind().describe("train", 0)) >= {"bmi", "progression"}
    for options in ({"queries": 0}, {"queries": 101}, {"measurement": "margin"}):
        with pytest.raises(tda.InputError):
            kind(**options)


def test_a_penalty_that_leaves_nothing_to_solve_is_refused():
    with pytest.raises(tda.InputError, match="penalty must be above 0, got 0"):
        RidgeDiabetes(penalty=0)
