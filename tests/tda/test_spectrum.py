"""A spectrum gives the inverse that a dense computation gives, under every damping, threshold and treatment of negative eigenvalues."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda.blocks import vector_block
from tda.curvature.spectrum import Inverse, Spectrum, check_memory, columns, decompose, diagonals, inverse_values, projected_bytes, solve
from tda.errors import InputError

VALUES = torch.tensor([-0.5, -1e-3, -1e-18, 0.0, 1e-18, 1e-4, 0.02, 1.0], dtype=torch.float64)


def blocks(*sizes):
    return [vector_block(f"b{i}", "scale", f"b{i}.weight", None, ((size,),)) for i, size in enumerate(sizes)]


def orthogonal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def matrix(values, seed=0):
    basis = orthogonal(len(values), seed)
    return (basis * values) @ basis.T


def spectrum(values, numbers=(0,), seed=0):
    return Spectrum(tuple(numbers), *decompose(matrix(values, seed)))


@settings(deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 9), overwrite=st.booleans())
def test_a_decomposition_is_of_the_symmetric_part(n, seed, overwrite):
    given_matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = given_matrix.clone()
    values, vectors = decompose(given_matrix, overwrite=overwrite)
    assert bool((values.diff() >= 0).all())
    torch.testing.assert_close((vectors * values) @ vectors.T, (before + before.T) / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    assert overwrite or torch.equal(given_matrix, before)


def test_tiles_that_do_not_divide_the_matrix_are_symmetrised_too():
    n = 1100
    given_matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.eigvalsh((given_matrix + given_matrix.T) / 2)
    torch.testing.assert_close(decompose(given_matrix)[0], expected, rtol=0, atol=1e-10)


def test_damping_gives_the_inverse_of_the_damped_matrix():
    values = torch.tensor([-0.3, 0.01, 0.2, 1.0], dtype=torch.float64)
    found, damping = spectrum(values), 0.07
    inverse = torch.linalg.inv(matrix(values) + damping * torch.eye(4, dtype=torch.float64))
    vectors = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solved = solve([found], [inverse_values(found.values, Inverse(damping, negative="keep"), psd=False)], vectors, blocks(4))
    torch.testing.assert_close(solved, vectors @ inverse, rtol=1e-12, atol=1e-12)


def test_without_damping_it_is_the_pseudo_inverse():
    values = torch.tensor([0.0, 0.0, 0.3, 2.0], dtype=torch.float64)
    found = spectrum(values)
    whole = solve([found], [inverse_values(found.values, Inverse(0.0), psd=True)], torch.eye(4, dtype=torch.float64), blocks(4))
    torch.testing.assert_close(whole, torch.linalg.pinv(matrix(values)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("inverse", "psd", "expected"),
    [
        (Inverse(0.1), True, [10, 10, 10, 10, 10, 1 / 0.1001, 1 / 0.12, 1 / 1.1]),
        (Inverse(0.1), False, [0, 0, 10, 10, 10, 1 / 0.1001, 1 / 0.12, 1 / 1.1]),
        (Inverse(0.1, negative="abs"), False, [1 / 0.6, 1 / 0.101, 10, 10, 10, 1 / 0.1001, 1 / 0.12, 1 / 1.1]),
        (Inverse(0.1, negative="keep"), False, [-1 / 0.4, 1 / 0.099, 10, 10, 10, 1 / 0.1001, 1 / 0.12, 1 / 1.1]),
        (Inverse(0.0), True, [0, 0, 0, 0, 0, 1e4, 50, 1]),
        (Inverse(0.0, negative="keep"), False, [-2, -1000, 0, 0, 0, 1e4, 50, 1]),
        (Inverse(0.0, pinv=1e-3, negative="keep"), False, [-2, -1000, 0, 0, 0, 0, 50, 1]),
        (Inverse(0.0, pinv=1e-3, negative="drop"), False, [0, 0, 0, 0, 0, 0, 50, 1]),
        (Inverse(0.1, pinv=0.05, negative="abs"), False, [1 / 0.6, 0, 0, 0, 0, 0, 0, 1 / 1.1]),
        (Inverse(0.1, pinv=1e-4), True, [0, 0, 0, 0, 0, 1 / 0.1001, 1 / 0.12, 1 / 1.1]),
    ],
    ids=repr,
)
def test_each_eigenvalue_is_treated_as_said(inverse, psd, expected):
    torch.testing.assert_close(inverse_values(VALUES, inverse, psd=psd), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_relative_threshold_is_a_share_of_the_largest_magnitude():
    absolute = inverse_values(VALUES * 30, Inverse(0.0, pinv=0.3, negative="abs"), psd=False)
    assert torch.equal(inverse_values(VALUES * 30, Inverse(0.0, pinv=0.01, relative=True, negative="abs"), psd=False), absolute)
    assert int((absolute > 0).sum()) == 3


def test_heuristic_damping_is_a_tenth_of_the_mean_magnitude():
    damping = 0.1 * float(VALUES.abs().mean())
    assert torch.equal(inverse_values(VALUES, Inverse(), psd=False), inverse_values(VALUES, Inverse(damping), psd=False))
    damping = 0.1 * float(VALUES.clamp(min=0).mean())
    assert torch.equal(inverse_values(VALUES, Inverse(), psd=True), inverse_values(VALUES, Inverse(damping), psd=True))


def test_a_matrix_of_zeros_has_the_inverse_of_its_damping():
    zeros = torch.zeros(3, dtype=torch.float64)
    assert inverse_values(zeros, Inverse(0.5), psd=False).tolist() == [2, 2, 2]
    assert inverse_values(zeros, Inverse(), psd=True).tolist() == [0, 0, 0]
    assert inverse_values(zeros, Inverse(0.0, pinv=0.1, relative=True), psd=False).tolist() == [0, 0, 0]


def test_damping_that_cancels_a_kept_eigenvalue_is_refused():
    with pytest.raises(InputError, match=r"damping = 0\.001 cancels the eigenvalue -0\.001 of the Hessian"):
        inverse_values(VALUES, Inverse(1e-3, negative="keep"), psd=False)
    assert bool(torch.isfinite(inverse_values(VALUES, Inverse(1e-3, negative="drop"), psd=False)).all())
    assert bool(torch.isfinite(inverse_values(VALUES, Inverse(1e-3, pinv=0.01, negative="keep"), psd=False)).all())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"damping": -1.0}, "damping must be a finite number >= 0"),
        ({"damping": float("nan")}, "damping must be a finite number >= 0"),
        ({"damping": True}, "damping must be a finite number >= 0"),
        ({"pinv": 0.0}, "pinv must be a finite number > 0"),
        ({"pinv": float("inf")}, "pinv must be a finite number > 0"),
        ({"relative": True}, "relative = true needs pinv"),
        ({"pinv": 1.0, "relative": True}, "leaves every eigenvalue out"),
        ({"negative": "clip"}, 'negative must be "drop", "abs" or "keep", got \'clip\''),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(options, told):
    with pytest.raises(InputError) as refused:
        Inverse(**options)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 5))
def test_diagonal_blocks_are_solved_each_in_its_own_coordinates(sizes, seed):
    some, generator = blocks(*sizes), torch.Generator().manual_seed(seed)
    pieces = [matrix(torch.rand(n, generator=generator, dtype=torch.float64), seed + i) for i, n in enumerate(sizes)]
    spectra = [Spectrum(d, *decompose(m)) for d, m in zip(diagonals(some, "block_ggn"), pieces, strict=True)]
    assert [columns(s, some) for s in spectra] == [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    whole = torch.block_diag(*pieces) + 0.1 * torch.eye(sum(sizes), dtype=torch.float64)
    vectors = torch.randn(2, sum(sizes), generator=generator, dtype=torch.float64)
    solved = solve(spectra, [inverse_values(s.values, Inverse(0.1), psd=True) for s in spectra], vectors, some)
    torch.testing.assert_close(solved @ whole, vectors, rtol=1e-10, atol=1e-10)


def test_all_blocks_share_one_matrix_unless_it_is_block_diagonal():
    assert diagonals(blocks(2, 3, 4), "ggn") == diagonals(blocks(2, 3, 4), "hessian") == [(0, 1, 2)]
    assert diagonals(blocks(2, 3, 4), "block_ggn") == [(0,), (1,), (2,)]


def test_what_would_not_fit_is_refused_with_its_bytes_and_what_to_use_instead():
    some = blocks(20_000, 6_122)
    assert projected_bytes(some, "ggn") == 4 * 8 * 26_122**2
    with pytest.raises(
        InputError, match=r'ggn of 26,122 parameters takes 20\.3 GiB .*memory_limit = 8 GiB;.* name = "cg", curvature = "ggn"'
    ):
        check_memory(some, "ggn", 8 << 30)
    with pytest.raises(InputError, match='name = "cg", curvature = "hessian"'):
        check_memory(some, "hessian", 8 << 30)
    with pytest.raises(InputError, match='name = "ekfac"'):
        check_memory(some, "block_ggn", 8 << 30)
    check_memory(some, "block_ggn", 12 << 30)
    check_memory(blocks(3466), "hessian", 8 << 30)
