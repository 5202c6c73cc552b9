"""DataInf against matrices that are inverted one example at a time."""

import pytest
import torch

from tda import Categorical, InputError
from tda.directions import dense, query_gradients
from tda.methods import datainf as module
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tests.tda.pipeline import Given, relative
from tests.tda.test_exactness import classes
from tests.tda.test_trak import jacobian


def loss(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


def conv() -> Given:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, groups=2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(16, 3))
    each = list(zip(torch.randn(16, 2, 4, 4).double(), torch.randint(3, (16,)), strict=True))
    return Given(model.double(), Categorical(), each[:12], each[12:])


def mean_of_inverses(gradients: torch.Tensor, damping: float) -> torch.Tensor:
    """(1/N) sum_j (g_j g_j^T + lambda I)^-1."""
    eye = torch.eye(gradients.shape[1], dtype=torch.float64)
    return torch.stack([torch.linalg.inv(torch.outer(g, g) + damping * eye) for g in gradients]).mean(0)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("damping", ["heuristic", 0.03])
@pytest.mark.parametrize("batch_size", [5, 100])
def test_a_direction_is_the_mean_of_the_inverses_times_the_query(kind, damping, batch_size, monkeypatch):
    monkeypatch.setattr(module, "GRADIENT_BYTES", 1000)
    problem = classes() if kind == "linear" else conv()
    attributed = inspect(problem, problem.given, problem.train)
    gradients, _ = query_gradients(attributed, problem.queries, range(4), batch_size=3)
    made = parse({"name": "datainf", "damping": damping}).directions(Work(attributed, problem.train, [], 0, batch_size), gradients)
    train, query = (jacobian(attributed, data, loss) for data in (problem.train, problem.queries))
    start = 0
    for b, block in enumerate(attributed.blocks):
        columns = slice(start, start + block.size)
        start += block.size
        lam = 0.1 * float(train[:, columns].square().mean()) if damping == "heuristic" else damping
        assert made.told["damping"][b] == pytest.approx(lam, rel=1e-12)
        wanted = -query[:, columns] @ mean_of_inverses(train[:, columns], lam)
        assert relative(dense(made.passes[0][b]).flatten(1), wanted) < 1e-9


def test_much_damping_orders_as_graddot_does():
    problem = classes()
    attributed = inspect(problem, problem.given, problem.train)
    gradients, _ = query_gradients(attributed, problem.queries, range(4), batch_size=3)
    (made,) = parse({"name": "datainf", "damping": 1e9}).directions(Work(attributed, problem.train, [], 0, 7), gradients).passes
    for found, gradient in zip(made, gradients, strict=True):
        assert relative(dense(found) * 1e9, -dense(gradient)) < 1e-6


def test_no_damping_is_refused():
    with pytest.raises(InputError, match=r"damping must be above 0, or \"heuristic\""):
        parse({"name": "datainf", "damping": 0})
