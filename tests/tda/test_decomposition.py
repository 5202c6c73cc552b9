"""The ladder's numbers against explicit matrices, and the identities that they must keep."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tda
from tda.blocks import to_matrix, to_parameters
from tda.curvature.fit import fit_factors
from tda.curvature.spectrum import Inverse, Spectrum, decompose
from tda.decomposition import RUNGS, Piece, Rung, alike, compare, from_factors, from_spectra, shares_of_steps, spectrum_overlap
from tda.decomposition_layers import layer_errors, layer_masses, off_block_mass
from tda.decomposition_scores import ladder_scores
from tda.modules import inspect
from tests.tda.pipeline import Given

PINV = Inverse(damping=0.0, pinv=1e-4, relative=False, negative="drop")
DAMPED = Inverse(damping=1e-2, pinv=None, relative=False, negative="drop")
ABSOLUTE = Inverse(damping=1e-2, pinv=None, relative=False, negative="abs")
HEURISTIC = Inverse(damping="heuristic", pinv=None, relative=False, negative="drop")
INVERSES = [PINV, DAMPED, ABSOLUTE, HEURISTIC]
SHARES = (0.05, 0.2, 0.5, 1.0)


class Ladder:
    """A small network with its curvatures as explicit matrices (D, D), and as rungs."""

    def __init__(self, model, likelihood, loss, inputs, targets):
        problem = Given(model.double(), likelihood, list(zip(inputs, targets, strict=True)))
        attributed = inspect(problem, problem.model(), problem.train_data())
        self.blocks = attributed.blocks
        self.edges = [0]
        for block in self.blocks:
            self.edges.append(self.edges[-1] + block.size)
        names = dict(model.named_parameters())
        flat = torch.cat([to_matrix(b, {n: names[n].detach() for n in b.parameters}).flatten() for b in self.blocks])

        def outputs(vector):
            parameters = {}
            for block, piece in zip(self.blocks, vector.split([b.size for b in self.blocks]), strict=True):
                parameters |= to_parameters(block, piece.view(block.groups, block.out, block.in_))
            return functional_call(model, parameters, (inputs,))

        def mean_loss(vector):
            return loss(outputs(vector), targets)

        hessian = torch.autograd.functional.hessian(mean_loss, flat)
        jacobian = torch.autograd.functional.jacobian(outputs, flat)
        curvature = torch.stack([torch.autograd.functional.hessian(lambda z, i=i: loss(z[None], targets[i : i + 1]), z)
                                 for i, z in enumerate(outputs(flat).detach())])  # fmt: skip
        ggn = torch.einsum("nca,ncd,ndb->ab", jacobian, curvature, jacobian) / len(inputs)
        factors = fit_factors(attributed, problem.train_data(), fisher="exact", batch_size=7)
        self.matrices = {"hessian": hessian, "ggn": ggn, "block_ggn": torch.block_diag(*(ggn[a:b, a:b] for a, b in pairwise(self.edges)))}
        everything = tuple(range(len(self.blocks)))
        self.rungs = {
            "hessian": from_spectra("hessian", self.blocks, [Spectrum(everything, *decompose(hessian))]),
            "ggn": from_spectra("ggn", self.blocks, [Spectrum(everything, *decompose(ggn))]),
            "block_ggn": from_spectra("block_ggn", self.blocks, [
                Spectrum((k,), *decompose(ggn[a:b, a:b])) for k, (a, b) in enumerate(pairwise(self.edges))]),
            "ekfac": from_factors("ekfac", factors),
            "kfac": from_factors("kfac", factors),
        }  # fmt: skip
        for name in ("ekfac", "kfac"):
            written = []
            for factor in factors:
                values = factor.eigenvalues if name == "ekfac" else factor.kronecker
                basis = torch.kron(factor.basis_out[0].contiguous(), factor.basis_in[0].contiguous())
                written.append(basis @ torch.diag(values.flatten()) @ basis.T)
            self.matrices[name] = torch.block_diag(*written)

    def inverses(self, inverse):
        """The inverse of every rung as a matrix, each diagonal block inverted by an eigendecomposition of the matrix at hand."""
        found = {}
        for name, matrix in self.matrices.items():
            edges = [0, len(matrix)] if name in ("hessian", "ggn") else self.edges
            found[name] = torch.block_diag(*(inverted(matrix[a:b, a:b], inverse, name) for a, b in pairwise(edges)))
        return found


def inverted(matrix, inverse, name):
    s, v = torch.linalg.eigh((matrix + matrix.T) / 2)
    damping = 0.1 * float(s.abs().mean()) if inverse.damping == "heuristic" else inverse.damping
    s = torch.where(s.abs() < 1e-13, 0.0, s)  # the softmax does not see a shift of all logits: such directions have no curvature
    kept, sizes = torch.ones_like(s, dtype=torch.bool), s.abs()
    if inverse.negative == "drop" and name == "hessian":
        kept = s >= 0
    if inverse.pinv is not None:
        kept &= s.abs() >= inverse.pinv
    return v @ torch.diag(torch.where(kept, 1 / torch.where(kept, sizes + damping, 1.0), 0.0)) @ v.T


@pytest.fixture(scope="module")
def ladder():
    """An MLP with tanh, away from any optimum: the Hessian is indefinite and every step of the ladder costs something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))
    inputs, targets = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    return Ladder(model, tda.Categorical(), functional.cross_entropy, inputs, targets)


PAIRS = [(a, b) for i, a in enumerate(RUNGS[:3]) for b in RUNGS[i:]]


@pytest.mark.parametrize(("upper", "lower"), PAIRS)
def test_every_error_is_that_of_the_explicit_matrices(ladder, upper, lower):
    found = compare(ladder.rungs[upper], ladder.rungs[lower], INVERSES)
    R, A = ladder.matrices[upper], ladder.matrices[lower]
    assert found.matrix == pytest.approx(float((R - A).norm() / R.norm()), abs=1e-9)
    for k, inverse in enumerate(INVERSES):
        explicit = ladder.inverses(inverse)
        inverse_R, inverse_A = explicit[upper], explicit[lower]
        assert float(found.inverse[k]) == pytest.approx(float((inverse_R - inverse_A).norm() / inverse_R.norm()), rel=1e-6, abs=1e-7)
        # R as its inverse sees it: damped, and in the directions that it drops as it is.
        projection = torch.linalg.pinv(inverse_R, hermitian=True, rtol=1e-10) @ inverse_R
        dropped = torch.eye(len(R), dtype=R.dtype) - projection
        seen = torch.linalg.pinv(inverse_R, hermitian=True, rtol=1e-10) + dropped @ R @ dropped
        error = (seen @ inverse_A - projection).norm() / projection.norm()
        assert float(found.product[k]) == pytest.approx(float(error), rel=1e-5, abs=1e-6)


def test_the_pseudo_inverse_s_second_error_is_of_the_plain_product(ladder):
    H, A = ladder.matrices["hessian"], ladder.inverses(PINV)["ekfac"]
    projection = H @ ladder.inverses(PINV)["hessian"]
    found = compare(ladder.rungs["hessian"], ladder.rungs["ekfac"], [PINV]).product[0]
    assert float(found) == pytest.approx(float((H @ A - projection).norm() / projection.norm()), rel=1e-8)


@pytest.mark.parametrize("rung", RUNGS[:3])
def test_a_rung_is_no_step_away_from_itself(ladder, rung):
    own = compare(ladder.rungs[rung], ladder.rungs[rung], INVERSES, SHARES)
    assert own.matrix < 1e-12
    assert float(own.inverse.max()) < 1e-9
    assert float(own.product.max()) < 1e-9
    assert torch.allclose(own.basis, torch.ones(len(SHARES), dtype=torch.float64))
    assert own.spectrum == 1


def test_the_eigenvalues_of_ekfac_are_the_best_in_its_basis(ladder):
    errors = {name: compare(ladder.rungs["block_ggn"], ladder.rungs[name], []).matrix for name in ("ekfac", "kfac")}
    assert 0.01 < errors["ekfac"] < errors["kfac"]
    layers = range(len(ladder.blocks))
    for layer in layers:
        block, ek, k = (ladder.rungs[name].only(layer) for name in ("block_ggn", "ekfac", "kfac"))
        assert compare(block, ek, []).matrix <= compare(block, k, []).matrix + 1e-12


def test_kfac_is_exact_on_deep_linear_networks_with_squared_error():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    inputs, targets = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    linear = Ladder(model, tda.Gaussian(), lambda z, y: 0.5 * (z - y).square().sum() / len(z), inputs, targets)
    for name in ("ekfac", "kfac"):
        found = compare(linear.rungs["block_ggn"], linear.rungs[name], [DAMPED])
        assert max(found.matrix, float(found.inverse[0]), float(found.product[0])) < 1e-10
    assert compare(linear.rungs["ggn"], linear.rungs["block_ggn"], []).matrix > 0.1


def test_shares_of_the_steps_sum_to_one_and_are_the_increases(ladder):
    errors = torch.stack([compare(ladder.rungs["hessian"], ladder.rungs[name], INVERSES).inverse for name in RUNGS], 1)
    shares = shares_of_steps(errors)
    assert shares.shape == (len(INVERSES), 4)
    assert torch.allclose(shares.sum(1), torch.ones(len(INVERSES), dtype=torch.float64))
    assert torch.allclose(shares * (errors[:, -1:] - errors[:, :1]), errors[:, 1:] - errors[:, :-1])


@pytest.mark.parametrize(("upper", "lower"), PAIRS)
def test_basis_overlap_is_that_of_the_explicit_eigenvectors(ladder, upper, lower):
    found = compare(ladder.rungs[upper], ladder.rungs[lower], [], SHARES).basis
    V, W = (columns(ladder.rungs[name]) for name in (upper, lower))
    for share, overlap in zip(SHARES, found.tolist(), strict=True):
        k = max(1, round(share * len(V)))
        assert overlap == pytest.approx(float((V[:, :k].T @ W[:, :k]).square().sum() / k), abs=1e-10)
        assert overlap <= 1 + 1e-12
    assert found[-1] == pytest.approx(1), "all eigenvectors span everything"


def columns(rung):
    """Its eigenvectors (D, D) written out, the largest eigenvalue's first."""
    written = torch.zeros(2 * [len(rung.values)], dtype=torch.float64)
    for piece in rung.pieces:
        written[piece.start : piece.stop, piece.start : piece.stop] = piece.rows(piece.start, piece.stop)
    return written[:, rung.values.argsort(descending=True, stable=True)]


def test_spectrum_overlap_is_one_for_equal_spectra_in_any_order_and_zero_for_none():
    values = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)
    assert spectrum_overlap(values, values[[2, 0, 1]]) == 1
    assert spectrum_overlap(values, torch.zeros(3, dtype=torch.float64)) == 0
    assert spectrum_overlap(values, 1.5 * values) == pytest.approx(0.5)


@pytest.mark.parametrize("inverse", INVERSES)
def test_layer_errors_are_those_of_the_inverses_diagonal_blocks(ladder, inverse):
    rungs = [ladder.rungs[name] for name in RUNGS]
    found, explicit = layer_errors(rungs, 3, ladder.edges, inverse), ladder.inverses(inverse)
    for layer, (a, b) in enumerate(pairwise(ladder.edges)):
        for i, upper in enumerate(RUNGS[:3]):
            for j, lower in enumerate(RUNGS):
                if j < i:
                    assert found[i, j, layer].isnan()
                    continue
                R, A = explicit[upper][a:b, a:b], explicit[lower][a:b, a:b]
                assert float(found[i, j, layer]) == pytest.approx(float((R - A).norm() / R.norm()), rel=1e-6, abs=1e-7)
        own = [compare(ladder.rungs["block_ggn"].only(layer), ladder.rungs[name].only(layer), [inverse]).inverse[0] for name in RUNGS[3:]]
        assert torch.allclose(found[2, 3:, layer], torch.stack(own)), "a block-diagonal matrix is inverted layer by layer"


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was made, views of what was there left out."""

    def __init__(self, there):
        super().__init__()
        self.there, self.most = {tensor.untyped_storage().data_ptr() for tensor in there}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.there:
                self.most = max(self.most, tensor.numel())
        return made


def test_measuring_forms_no_further_matrix(ladder, monkeypatch):
    monkeypatch.setattr("tda.decomposition.CHUNK", 64)
    rungs = [ladder.rungs[name] for name in RUNGS]
    count = ladder.edges[-1]
    largest = max(block.size for block in ladder.blocks)
    queries, train = torch.randn(2, count, dtype=torch.float64), torch.randn(200, count, dtype=torch.float64)
    uses = {
        "errors": lambda: [layer_errors(rungs, 3, ladder.edges, inverse) for inverse in INVERSES],
        "masses": lambda: [layer_masses(rung, ladder.edges) for rung in rungs],
        "compare": lambda: [compare(rungs[0], rung, INVERSES, SHARES) for rung in rungs],
        "scores": lambda: [ladder_scores(rung, INVERSES[:1], queries, train) for rung in rungs],
    }
    for name, use in uses.items():
        with Largest([piece.vectors for rung in rungs[:3] for piece in rung.pieces]) as seen:
            use()
        bound = 2 * len(train) if name == "scores" else 5 * count
        assert 0 < seen.most <= bound < largest**2, name


@pytest.mark.parametrize("name", RUNGS)
def test_scores_are_those_of_the_explicit_inverse_however_they_are_cut(ladder, name, monkeypatch):
    monkeypatch.setattr("tda.decomposition.CHUNK", 150)
    count = ladder.edges[-1]
    queries, train = torch.randn(3, count, dtype=torch.float64), torch.randn(7, count, dtype=torch.float64)
    found = ladder_scores(ladder.rungs[name], [DAMPED, ABSOLUTE], queries, train)
    for k, inverse in enumerate((DAMPED, ABSOLUTE)):
        assert torch.allclose(found[k], -queries @ ladder.inverses(inverse)[name] @ train.T / 7, rtol=1e-7, atol=1e-9)


RELATIVE = Inverse(damping=0.0, pinv=1e-2, relative=True, negative="drop")


@pytest.mark.parametrize("inverse", [HEURISTIC, RELATIVE], ids=["heuristic", "relative"])
def test_a_block_diagonal_matrix_is_no_step_from_its_blocks_where_all_are_inverted_alike(inverse):
    generator = torch.Generator().manual_seed(0)
    roots = [torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (3, 5)]
    parts = [scale * root @ root.T for scale, root in zip((1.0, 100.0), roots, strict=True)]
    whole = Rung("ggn", (Piece(0, *decompose(torch.block_diag(*parts))),), psd=True)
    blocks = Rung("block_ggn", (Piece(0, *decompose(parts[0])), Piece(3, *decompose(parts[1]))), psd=True)
    own, shared = (compare(whole, blocks, [each]) for each in (inverse, alike(inverse, whole)))
    assert float(own.inverse) > 0.1, "each block by its own mean, or its own largest eigenvalue"
    assert float(shared.inverse) < 1e-10
    assert float(shared.product) < 1e-10


@pytest.mark.parametrize("inverse", [*INVERSES, RELATIVE])
def test_for_its_reference_an_inverse_made_alike_is_what_it_was(ladder, inverse):
    hessian = ladder.rungs["hessian"]
    fixed = alike(inverse, hessian)
    assert torch.equal(hessian.inverted(fixed), hessian.inverted(inverse))
    assert alike(fixed, ladder.rungs["ggn"]) == fixed


@pytest.mark.parametrize("name", RUNGS)
def test_off_block_mass_is_that_of_the_explicit_matrix(ladder, name):
    M = ladder.matrices[name]
    masses = layer_masses(ladder.rungs[name], ladder.edges)
    diagonal = torch.block_diag(*(M[a:b, a:b] for a, b in pairwise(ladder.edges)))
    assert float(masses.norm()) == pytest.approx(float(M.norm()))
    assert off_block_mass(masses) == pytest.approx(float((M - diagonal).norm() / M.norm()), abs=1e-12)
    if name in ("block_ggn", "ekfac", "kfac"):
        assert off_block_mass(masses) == 0


@given(cut=st.integers(1, 11), entries=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_neither_chunks_nor_signs_nor_order_of_eigenvectors_matter(cut, entries, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(12, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    s, v = decompose(A + A.T)
    whole = Rung("hessian", (Piece(0, s, v),), psd=False)
    order, sign = torch.randperm(12, generator=generator), torch.randint(2, (12,), generator=generator) * 2.0 - 1
    turned = Rung("hessian", (Piece(0, s[order], (v * sign)[:, order]),), psd=False)
    pieces = []
    for start, stop in ((0, cut), (cut, 12)):
        pieces.append(Piece(start, *decompose((B @ B.T)[start:stop, start:stop])))
    blocks = Rung("block_ggn", tuple(pieces), psd=True)
    wanted = compare(whole, blocks, INVERSES, SHARES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tda.decomposition.CHUNK", entries)
        found = compare(turned, blocks, INVERSES, SHARES)
    assert found.matrix == pytest.approx(wanted.matrix)
    for name in ("inverse", "product", "basis"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), atol=1e-9, equal_nan=True)


def test_an_inverse_that_drops_everything_has_no_relative_error():
    one = Rung("ggn", (Piece(0, torch.full((2,), 1e-6, dtype=torch.float64), torch.eye(2, dtype=torch.float64)),), psd=True)
    found = compare(one, one, [PINV])
    assert found.inverse.isnan().all()
    assert found.product.isnan().all()
    assert found.matrix == 0
