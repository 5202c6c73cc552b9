"""Products with the curvature are the dense matrices that autograd gives row by row, for every kind of layer and likelihood."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda import Bernoulli, Categorical, Gaussian, InputError, TokenCategorical, flat
from tda.blocks import to_matrix
from tda.modules import inspect
from tda.solvers import columns
from tda.solvers.operator import Operator
from tests.tda.layers import LAYERS
from tests.tda.pipeline import Given

KINDS = ("ggn", "hessian", "block_ggn")
EXAMPLES = 5


@pytest.fixture(autouse=True)
def plain_attention():
    """The truths need second derivatives, which fused attention does not have."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(fused)


def derivatives(attributed, scalar, *, create_graph=False):
    """The gradient (D,) of a scalar, in flat coordinates."""
    parameters = dict(attributed.model.named_parameters())
    names = [n for b in attributed.blocks for n in b.parameters]
    found = torch.autograd.grad(scalar, [parameters[n] for n in names], create_graph=create_graph, retain_graph=True, allow_unused=True)
    named = {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, found, strict=True)}
    return torch.cat([to_matrix(b, named).flatten() for b in attributed.blocks])


def dense(attributed, dataset, kind):
    """The matrix (D, D), one example at a time: explicit J^T H J, or second derivatives one parameter at a time."""
    problem, total = attributed.problem, flat.total(attributed.blocks)
    matrix = torch.zeros(total, total, dtype=torch.float64)
    for i in range(len(dataset)):
        batch = attributed.load(dataset, [i])
        outputs = problem.predict(attributed.model, batch)
        if kind == "hessian":
            first = derivatives(attributed, problem.likelihood.loss(outputs, batch.targets).sum(), create_graph=True)
            if first.requires_grad:
                matrix += torch.stack([derivatives(attributed, entry) for entry in first])
            continue
        jacobian = torch.stack([derivatives(attributed, entry) for entry in outputs.flatten()])
        curved = torch.autograd.functional.hessian(lambda o, t=batch.targets: problem.likelihood.loss(o, t).sum(), outputs.detach())
        matrix += jacobian.T @ curved.reshape(len(jacobian), -1) @ jacobian
    if kind == "block_ggn":
        kept = torch.block_diag(*(torch.ones(b.size, b.size, dtype=torch.float64) for b in attributed.blocks))
        matrix *= kept
    return matrix / len(dataset)


def agree(found, wanted, tolerance=1e-9):
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def small(likelihood=None, targets=None, seed=0, examples=11):
    """A small MLP and a problem around it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    data = list(zip(torch.randn(examples, 4).double(), targets or torch.randint(0, 3, (examples,)), strict=True))
    return inspect(Given(model, likelihood or Categorical(), data), model, data), data


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # nn.Bilinear: vmap multiplies it one vector at a time
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_row_equals_autograd_for_every_layer(name, kind):
    layer = LAYERS[name]
    model, data = layer.build(), layer.examples(3)
    problem = Given(model, layer.likelihood, data, predict=layer.predict)
    attributed = inspect(problem, model, data)
    if flat.total(attributed.blocks) > 400 and kind == "hessian":
        pytest.skip("the dense second derivatives take long")
    truth = dense(attributed, data, kind)
    operator = Operator(attributed, data, kind, batch_size=2)
    agree(operator.rows(0, operator.size), truth)


@pytest.mark.parametrize("kind", ["ggn", "block_ggn"])
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if not isinstance(layer.likelihood, TokenCategorical)])
def test_outer_products_of_gradients_give_the_same_rows_for_every_layer(name, kind):
    layer = LAYERS[name]
    model, data = layer.build(), layer.examples(3)
    attributed = inspect(Given(model, layer.likelihood, data, predict=layer.predict), model, data)
    cuts = [0, 3, flat.total(attributed.blocks) // 2 + 2, flat.total(attributed.blocks)]
    rows = [
        columns.rows(attributed, data, a, b, block_diagonal=kind == "block_ggn", batch_size=2)
        for a, b in itertools.pairwise(sorted(set(cuts)))
    ]
    agree(torch.cat(rows), dense(attributed, data, kind))


def test_rows_are_outer_products_where_columns_are_few_or_weights_are_shared_by_many_positions():
    assert columns.worth_it(*small())
    wide = nn.Linear(4, 50).double().eval()
    examples = [(torch.randn(4).double(), torch.tensor(i)) for i in range(3)]
    assert not columns.worth_it(inspect(Given(wide, Categorical(), examples), wide, examples), examples)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double().eval()
    data = [(torch.randn(1, 8, 8).double(), torch.tensor(i % 3)) for i in range(3)]
    assert columns.worth_it(inspect(Given(model, Categorical(), data), model, data), data)


class NotItsFisher(Categorical):
    """Whose columns are not a root of its Hessian."""

    def hessian_product(self, outputs, targets, tangents):
        return 2 * super().hessian_product(outputs, targets, tangents)


def test_rows_are_products_where_the_columns_are_no_root_of_the_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double().eval()
    data = [(torch.randn(1, 8, 8).double(), torch.tensor(i % 3)) for i in range(3)]
    attributed = inspect(Given(model, NotItsFisher(), data), model, data)
    assert not columns.worth_it(attributed, data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        (Gaussian(), lambda n: torch.randn(n, 3).double()),
        (Bernoulli(), lambda n: torch.randint(0, 2, (n, 3)).double()),
        (Categorical(), lambda n: torch.randint(0, 3, (n,))),
    ],
    ids=["Gaussian", "Bernoulli", "Categorical"],
)
def test_products_equal_the_dense_matrix_for_every_likelihood(kind, likelihood, targets):
    attributed, data = small(likelihood, list(targets(EXAMPLES)), examples=EXAMPLES)
    vectors = torch.randn(4, flat.total(attributed.blocks), dtype=torch.float64)
    found = Operator(attributed, data, kind, batch_size=2).product(vectors)
    agree(found, vectors @ dense(attributed, data, kind))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_leave_ignored_tokens_out(kind, reduction):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()
    targets = torch.tensor([[0, 2, -100], [1, -100, -100], [-100, -100, -100], [2, 1, 0]])
    data = list(zip(torch.randn(4, 3, 4).double(), targets, strict=True))
    attributed = inspect(Given(model, TokenCategorical(reduction=reduction), data), model, data)
    vectors = torch.randn(2, flat.total(attributed.blocks), dtype=torch.float64)
    agree(Operator(attributed, data, kind, batch_size=3).product(vectors), vectors @ dense(attributed, data, kind))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_output_hessians_equal_autograd(data):
    name = data.draw(st.sampled_from(["Categorical", "TokenCategorical", "Gaussian", "Bernoulli"]))
    batch, lead = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([(), (2,), (2, 3)]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    shape = {"Categorical": (batch, 4), "TokenCategorical": (batch, 3, 4)}.get(name, (batch, 2))
    outputs = torch.randn(shape, dtype=torch.float64)
    targets = {
        "Categorical": torch.randint(0, 4, shape[:1]),
        "TokenCategorical": torch.where(torch.rand(shape[:2]) < 0.3, -100, torch.randint(0, 4, shape[:2])),
        "Gaussian": torch.randn(shape, dtype=torch.float64),
        "Bernoulli": torch.rand(shape, dtype=torch.float64),
    }[name]
    likelihood = {"Categorical": Categorical(), "TokenCategorical": TokenCategorical(), "Gaussian": Gaussian(), "Bernoulli": Bernoulli()}[
        name
    ]
    curved = torch.autograd.functional.hessian(lambda o: likelihood.loss(o, targets).sum(), outputs).reshape(outputs.numel(), -1)
    tangents = torch.randn(*lead, *shape, dtype=torch.float64)
    wanted = (tangents.reshape(-1, outputs.numel()) @ curved).view_as(tangents)
    assert torch.allclose(likelihood.hessian_product(outputs, targets, tangents), wanted, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_products_do_not_depend_on_batch_size_or_on_how_vectors_are_cut(kind, monkeypatch):
    attributed, data = small()
    vectors = torch.randn(7, flat.total(attributed.blocks), dtype=torch.float64)
    whole = Operator(attributed, data, kind, batch_size=11).product(vectors)
    for size in (1, 2, 7, 100):
        agree(Operator(attributed, data, kind, batch_size=size).product(vectors), whole, 1e-12)
    monkeypatch.setattr("tda.solvers.operator.TANGENT_BYTES", 5000)
    agree(Operator(attributed, data, kind, batch_size=3).product(vectors), whole, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_over_some_examples_is_their_mean(kind):
    attributed, data = small()
    ids = [3, 7, 8]
    vectors = torch.randn(2, flat.total(attributed.blocks), dtype=torch.float64)
    found = Operator(attributed, data, kind, batch_size=2).product(vectors, ids)
    agree(found, vectors @ dense(attributed, [data[i] for i in ids], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_matrix_wherever_they_are_cut(kind):
    attributed, data = small()
    operator = Operator(attributed, data, kind, batch_size=4)
    truth, cuts = dense(attributed, data, kind), [0, 3, 24, 26, operator.size]
    agree(torch.cat([operator.rows(a, b) for a, b in itertools.pairwise(cuts)]), truth)
    assert operator.rows(5, 5).shape == (0, operator.size)


def test_vectors_keep_their_dtype_and_skipped_parameters_are_constants():
    attributed, data = small()
    part = inspect(attributed.problem, attributed.model, data, exclude=["0.weight"])
    vectors = torch.randn(2, flat.total(part.blocks))
    found = Operator(part, data, "ggn", batch_size=4).product(vectors)
    assert found.dtype == torch.float32
    agree(found, (vectors.double() @ dense(part, data, "ggn")).float(), 1e-5)
    assert all(p.grad is None for p in attributed.model.parameters())


def test_flat_coordinates_are_the_blocks_side_by_side_and_back():
    attributed, _ = small()
    vectors = torch.randn(3, flat.total(attributed.blocks))
    matrices = flat.unflatten(attributed.blocks, vectors)
    assert torch.equal(flat.flatten(attributed.blocks, matrices), vectors)
    assert torch.equal(matrices[1][:, 0, 1, :], vectors[:, 25 + 6 : 25 + 12])


class Opaque(torch.autograd.Function):
    """An operation that only has a backward pass."""

    @staticmethod
    def forward(_ctx, x):
        return x * 2

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * 2


class Closed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return Opaque.apply(self.inner(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_torch_func_cannot_differentiate_is_refused_in_one_line(kind):
    model = Closed().double().eval()
    data = [(torch.randn(4).double(), torch.tensor(1)) for _ in range(3)]
    operator = Operator(inspect(Given(model, Categorical(), data), model, data), data, kind, batch_size=3)
    with pytest.raises(InputError, match=f'cannot differentiate this model for curvature = "{kind}"') as told:
        operator.product(torch.zeros(1, operator.size))
    assert "\n" not in str(told.value)


def test_a_likelihood_without_an_output_hessian_is_named():
    class Own(Gaussian):
        hessian_product = None

    attributed, data = small(Own(), list(torch.randn(4, 3).double()), examples=4)
    with pytest.raises(InputError, match="Own has no hessian_product"):
        Operator(attributed, data, "ggn", batch_size=3).product(torch.zeros(1, 43))


MEMORY = """
import torch
from torch import nn
from tda import Categorical
from tda.modules import inspect
from tda.solvers import columns
from tda.solvers.operator import Operator
from tests.tda.pipeline import Given

def peak():
    # Not ru_maxrss, which begins at what the parent process had.
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, {width}), nn.ReLU(), nn.Linear({width}, {width}), nn.ReLU(), nn.Linear({width}, 10)).eval()
data = [(torch.randn(64), torch.tensor(i % 10)) for i in range(64)]
operator = Operator(inspect(Given(model, Categorical(), data), model, data), data, "{kind}", 64)
vectors = torch.randn(4, operator.size)
operator.product(vectors[:1], range(1))
before = peak()
operator.product(vectors)
print(operator.size, peak() - before)
"""


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_peak_memory_grows_with_the_parameters_not_with_their_square(kind):
    measured = []
    for width in (500, 1500):
        told = subprocess.run(
            [sys.executable, "-c", MEMORY.format(width=width, kind=kind)], capture_output=True, text=True, check=True, timeout=120
        )
        measured.append([int(word) for word in told.stdout.split()])
    assert measured[1][0] > 7 * measured[0][0]
    assert measured[1][1] > 4 * measured[1][0] * 4  # the measurement sees the vectors
    # A handful of copies of the four vectors, where the matrix would have size / 4 of them.
    for size, grown in measured:
        assert grown < 10 * (4 * size * 4) + (32 << 20)
