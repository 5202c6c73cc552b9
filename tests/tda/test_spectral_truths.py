"""Dense methods give the stored truths, and the scores of an explicit inverse, under each of their options."""

import math
from dataclasses import replace
from functools import cache

import pytest
import scipy.linalg
import torch
from pydantic import ValidationError
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from tda import Categorical, flat
from tda.blocks import to_matrix, to_parameters
from tda.curvature import spectrum
from tda.curvature.spectrum import Spectrum, diagonals
from tda.directions import Dense, dense, query_gradients
from tda.errors import InputError
from tda.methods.spectral import GGN, BlockGGN, Hessian, parse_bytes
from tda.methods.work import Fit, Work
from tda.modules import inspect
from tda.scoring import Scorer, score
from tda.solvers.operator import Operator
from tests import cases
from tests.tda.pipeline import Given, relative

QUERIES = 8
METHODS = {"hess": Hessian, "ggn": GGN, "bggn": BlockGGN}


def spectra_of(attributed, matrix, kind):
    found, start = [], 0
    for some in diagonals(attributed.blocks, kind):
        n = sum(attributed.blocks[b].size for b in some)
        found.append(Spectrum(some, *spectrum.decompose(matrix[start : start + n, start : start + n])))
        start += n
    return tuple(found)


def scores_of(problem, attributed, method, spectra):
    """(influence (query, train), self-influence (train,)) as a run computes them."""
    gradients, _ = query_gradients(attributed, problem.queries, range(len(problem.queries)), batch_size=64)
    (directions,) = method.directions(Work(attributed, problem.train, [spectra], 0, 64), gradients).passes
    norms = torch.stack([dense(g).square().sum((1, 2, 3)) for g in gradients]).sum(0).sqrt()
    scorer = Scorer(method.title, directions, norms, method.own([spectra]))
    n = len(problem.train)
    found = score(attributed, [scorer], problem.train, range(n), examples=n, batch_size=64)
    return found.influence[0], found.self_influence[0]


def influence_of(problem, attributed, method, spectra):
    return scores_of(problem, attributed, method, spectra)[0]


@pytest.fixture(scope="module")
def case_d():
    case = cases.load_case("d")
    pairs = [list(zip(x, y, strict=True)) for x, y in ((case.train_inputs, case.train_targets), (case.query_inputs, case.query_targets))]
    problem = Given(case.model, Categorical(), pairs[0], pairs[1][:QUERIES])
    return case, problem, inspect(problem, case.model, problem.train)


@pytest.fixture(scope="module")
def matrix_d(case_d):
    """The Hessian and the GGN of case d, each formed once."""

    @cache
    def formed(kind):
        operator = Operator(case_d[2], case_d[1].train, kind, 256)
        return torch.cat([operator.rows(k, min(k + 512, operator.size)) for k in range(0, operator.size, 512)])

    return formed


@pytest.mark.parametrize("rung", ["hess", "ggn", "bggn"])
def test_scores_are_the_stored_truths(case_d, matrix_d, rung):
    case, problem, attributed = case_d
    kind = METHODS[rung].curvature
    spectra = spectra_of(attributed, matrix_d("hessian" if rung == "hess" else "ggn"), kind)
    options = {"negative": "keep"} if rung == "hess" else {}
    for name, damping in (("fix", case.fix_damping), ("d2", 0.01)):
        found, truth = influence_of(problem, attributed, METHODS[rung](damping=damping, **options), spectra), case.truth[f"{rung}_{name}"]
        assert float((found - truth).norm() / truth.norm()) < 1e-9
        assert relative(found, truth) < 1e-9
        assert relative(found, case.truth["graddot"]) > 0.5


@pytest.fixture(scope="module")
def small():
    """A model with every structure of block, away from a minimum, and what autograd says of it in flat coordinates."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y = torch.randn(15, 4, generator=generator, dtype=torch.float64), torch.randint(3, (15,), generator=generator)
    pairs = list(zip(x, y, strict=True))
    problem = Given(model, Categorical(), pairs[:11], pairs[11:])
    attributed = inspect(problem, model, problem.train)

    def outputs(w, inputs):
        matrices = flat.unflatten(attributed.blocks, w[None])
        named = [to_parameters(block, matrix[0]) for block, matrix in zip(attributed.blocks, matrices, strict=True)]
        return functional_call(model, {name: tensor for found in named for name, tensor in found.items()}, (inputs,))

    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    w = flat.flatten(attributed.blocks, [to_matrix(block, parameters)[None] for block in attributed.blocks])[0]
    jacobian = torch.autograd.functional.jacobian(lambda at: outputs(at, x[:11]), w)
    p = outputs(w, x[:11]).softmax(1).detach()
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    ggn = torch.einsum("nkd,nkl,nle->de", jacobian, curved, jacobian) / 11
    sizes = [block.size for block in attributed.blocks]
    mask = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in sizes))
    hessian = torch.autograd.functional.hessian(lambda at: functional.cross_entropy(outputs(at, x[:11]), y[:11]), w)
    gradients = torch.autograd.functional.jacobian(lambda at: functional.cross_entropy(outputs(at, x), y, reduction="none"), w)
    return problem, attributed, {"ggn": ggn, "block_ggn": ggn * mask, "hessian": hessian}, gradients


def treated(matrix, negative, damping):
    """The dense inverse of a matrix without its negative part, or with its sign changed."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = vectors[:, values > (0 if negative == "drop" else -math.inf)]
    positive = kept.T @ matrix @ kept
    absolute = scipy.linalg.sqrtm((positive @ positive).numpy())
    return kept @ torch.linalg.inv(torch.from_numpy(absolute.real) + damping * torch.eye(len(positive), dtype=torch.float64)) @ kept.T


def damped(matrix, damping):
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))


def heuristic(matrix, sizes):
    """0.1 x the mean eigenvalue of every diagonal block, added to it."""
    each = [part.split(sizes, 1)[d] for d, part in enumerate(matrix.split(sizes))]
    return torch.block_diag(*(damped(m, 0.1 * float(m.trace()) / len(m)) for m in each))


@pytest.mark.parametrize(
    ("method", "inverse"),
    [
        (GGN(damping=1e-4), lambda c: damped(c["ggn"], 1e-4)),
        (GGN(), lambda c: heuristic(c["ggn"], [53])),
        (GGN(damping=0.0, pinv=1e-3), lambda c: torch.linalg.pinv(c["ggn"], atol=1e-3, rtol=0, hermitian=True)),
        (GGN(damping=0.0, pinv=0.02, relative=True), lambda c: torch.linalg.pinv(c["ggn"], rtol=0.02, hermitian=True)),
        (BlockGGN(damping=1e-4), lambda c: damped(c["block_ggn"], 1e-4)),
        (BlockGGN(), lambda c: heuristic(c["ggn"], [25, 10, 18])),
        (Hessian(damping=1e-3, negative="keep"), lambda c: damped(c["hessian"], 1e-3)),
        (Hessian(damping=1e-3, negative="abs"), lambda c: treated(c["hessian"], "abs", 1e-3)),
        (Hessian(damping=1e-3), lambda c: treated(c["hessian"], "drop", 1e-3)),
    ],
    ids=lambda value: str(value.inverse) if isinstance(value, GGN) else "",
)
def test_every_option_is_the_dense_inverse_it_says(small, method, inverse):
    problem, attributed, matrices, gradients = small
    operator = Operator(attributed, problem.train, method.curvature, 4)
    spectra = spectra_of(attributed, operator.rows(0, operator.size), method.curvature)
    dense_inverse = inverse(matrices)
    train, queries = gradients[:11], gradients[11:]
    found, own = scores_of(problem, attributed, method, spectra)
    assert relative(found, -queries @ dense_inverse @ train.T / 11) < 1e-9
    assert relative(own, -torch.einsum("nd,de,ne->n", train, dense_inverse, train) / 11) < 1e-9
    assert relative(-queries @ train.T / 11 * (found.norm() / (queries @ train.T / 11).norm()), found) > 0.05


def test_the_hessian_away_from_a_minimum_has_negative_eigenvalues(small):
    assert float(torch.linalg.eigvalsh(small[2]["hessian"])[0]) < -1e-3


def test_the_damping_told_is_the_one_used(small):
    _, attributed, matrices, _ = small
    spectra = {kind: spectra_of(attributed, matrix, kind) for kind, matrix in matrices.items()}
    assert GGN().damping_of([spectra["ggn"]]) == pytest.approx(0.1 * float(matrices["ggn"].trace()) / len(matrices["ggn"]))
    assert len(BlockGGN().damping_of([spectra["block_ggn"]])) == len(attributed.blocks)
    assert Hessian(damping=0.5).damping_of([spectra["hessian"]]) == 0.5


def test_directions_have_the_dtype_of_the_model(small):
    problem, attributed, matrices, _ = small
    gradients, _ = query_gradients(attributed, problem.queries, [0, 1], batch_size=2)
    single = [Dense(dense(gradient).float()) for gradient in gradients]
    work = Work(replace(attributed, dtype=torch.float32), problem.train, [spectra_of(attributed, matrices["ggn"], "ggn")], 0, 4)
    (directions,) = GGN(damping=1e-3).directions(work, single).passes
    assert {direction.matrix.dtype for direction in directions} == {torch.float32}
    exact = dense(gradients[0]), damped(matrices["ggn"], 1e-3)
    whole = -flat.flatten(attributed.blocks, [dense(g) for g in gradients]) @ exact[1]
    assert relative(flat.flatten(attributed.blocks, [d.matrix for d in directions]), whole) < 1e-4


def test_each_method_names_its_spectra():
    found = [method.fits for method in (Hessian(), GGN(), BlockGGN())]
    assert found == [(Fit("dense", "hessian"),), (Fit("dense", "ggn"),), (Fit("dense", "block_ggn"),)]


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (GGN, {"damping": -1e-3}, "damping must be a finite number >= 0"),
        (GGN, {"pinv": -1.0}, "pinv must be a finite number > 0"),
        (GGN, {"pinv": True}, "pinv must be a finite number > 0"),
        (GGN, {"pinv": "1e-4"}, "pinv must be a finite number > 0"),
        (GGN, {"relative": True}, "relative = true needs pinv"),
        (BlockGGN, {"relative": True, "pinv": 2}, "give a share below 1"),
        (Hessian, {"negative": "clip"}, 'negative must be "drop", "abs" or "keep"'),
        (Hessian, {"memory_limit": "lots"}, "memory_limit must be a number of bytes"),
        (Hessian, {"memory_limit": 0}, "memory_limit must be a number of bytes"),
        (GGN, {"negative": "abs"}, "negative"),
    ],
)
def test_options_out_of_range_are_refused(method, options, told):
    with pytest.raises(ValidationError) as refused:
        method(**options)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("1.5KiB", 1536), ("7B", 7), ("2kB", 2000), (123, 123)]
)
def test_a_memory_limit_is_a_number_of_bytes(text, count):
    assert parse_bytes(text) == count


def test_a_matrix_over_the_memory_limit_is_refused_before_it_is_formed(small):
    blocks = small[1].blocks
    GGN().check_size(blocks)
    with pytest.raises(InputError, match=r"ggn of 53 parameters takes .* name = \"cg\", curvature = \"ggn\""):
        GGN(memory_limit="10kB").check_size(blocks)
    BlockGGN(memory_limit="50kB").check_size(blocks)
