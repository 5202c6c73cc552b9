"""What a solver cannot do is said in one line that names the query and a way out, or told as not converged."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tda import Categorical, InputError, flat
from tda.directions import dense, query_gradients
from tda.modules import inspect
from tda.solvers.astra import NAMED, Schedule, astra
from tda.solvers.block import block_conjugate_gradients
from tda.solvers.cg import conjugate_gradients
from tda.solvers.operator import Operator
from tda.solvers.preconditioner import ekfac_preconditioner
from tda.solvers.sni import neumann
from tda.solvers.system import System
from tests.tda.pipeline import Given, fit
from tests.tda.systems import EXAMPLES, QUERIES, SHORT, SOLVERS, Setting


@pytest.fixture(scope="module")
def setting():
    return Setting()


def test_an_indefinite_hessian_is_refused_with_the_query_and_the_way_out():
    setting = Setting("hessian", damping=1e-4)
    assert float(torch.linalg.eigvalsh(setting.matrix)[0]) < -1e-3
    with pytest.raises(
        InputError, match=r'not positive definite: .* of query \d+; raise the damping or, if it is a Hessian, take curvature = "ggn"'
    ):
        conjugate_gradients(setting.system, tolerance=1e-9)
    with pytest.raises(InputError, match="not positive definite"):
        block_conjugate_gradients(setting.system, setting.ekfac, tolerance=1e-9)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_step_that_is_too_large_is_named_with_one_that_would_do(batch_size, setting):
    with pytest.raises(InputError, match=r"sni diverged at step \d+: .* step_size = 50 is too large, [\d.]+ would do"):
        neumann(setting.system, step_size=50.0, batch_size=batch_size, max_steps=500)
    with pytest.raises(InputError, match=r"astra diverged at step \d+: .* step_size = 50 is too large, [\d.]+ would do"):
        astra(setting.system, setting.ekfac, schedule=Schedule(500, batch_size, step_size=50.0))


@pytest.mark.parametrize("max_steps", [1, 5])
def test_a_solve_whose_last_residual_overflows_is_refused_like_any_that_diverges(max_steps, setting):
    told = r"diverged at step 1: .* is inf; step_size = 1e\+300 is too large, [\d.]+ would do"
    with pytest.raises(InputError, match="sni " + told):
        neumann(setting.system, step_size=1e300, max_steps=max_steps)
    with pytest.raises(InputError, match="astra " + told):
        astra(setting.system, setting.ekfac, schedule=Schedule(max_steps, step_size=1e300))


@pytest.mark.parametrize("step_size", [None, 0.2, 50.0])
def test_a_divergence_that_no_step_size_mends_is_not_blamed_on_it(step_size):
    setting = Setting("hessian", damping=1e-4)
    way_out = 'no step size would do; raise the damping or, if it is a Hessian, take curvature = "ggn"'
    for solve in (
        lambda: neumann(setting.system, step_size=step_size, max_steps=100_000),
        lambda: astra(setting.system, setting.ekfac, schedule=Schedule(100_000, step_size=step_size), start="zero"),
    ):
        with pytest.raises(InputError) as error:
            solve()
        assert str(error.value).endswith(f"C + damping is not positive definite, and {way_out}")


def test_a_published_schedule_that_diverges_is_told_of_its_damping(setting):
    """Its steps are a multiple of the damping, and no option of astra_source sets them."""
    system, ekfac = setting.damped(40.0), ekfac_preconditioner(setting.blocks, setting.factors, 1e-3)
    with pytest.raises(InputError, match=r"diverged at step \d+: .*; the schedule.s steps follow from the damping, and 4 is too") as error:
        astra(system, ekfac, schedule=NAMED["paper"])
    assert str(error.value).endswith('lower the damping, or choose schedule = "tuned"')
    assert "step_size" not in str(error.value)


def test_a_published_schedule_without_damping_is_refused_before_any_work(setting):
    def product(x, ids=None):
        raise AssertionError

    system = System(product, torch.tensor(0.0), setting.right, EXAMPLES)
    with pytest.raises(InputError, match=r'^damping = 0: the schedule.s steps are 0\.1 x damping, .* schedule = "tuned"$'):
        astra(system, product, schedule=NAMED["paper"])


def rectified(dtype, damping):
    """A network with hidden units that no example ever moves: its Gauss-Newton matrix has directions of curvature 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 3)).to(dtype).eval()
    data, queries = ([(torch.randn(10).to(dtype), torch.randint(0, 3, ())) for _ in range(n)] for n in (EXAMPLES, QUERIES))
    attributed = inspect(Given(model, Categorical(), data, queries), model, data)
    gradients, _ = query_gradients(attributed, queries, range(QUERIES), batch_size=QUERIES)
    right = flat.flatten(attributed.blocks, [dense(g) for g in gradients])
    ekfac = ekfac_preconditioner(attributed.blocks, fit(attributed, data, [range(EXAMPLES)], fisher="exact"), damping)
    return System(Operator(attributed, data, "ggn", EXAMPLES).product, torch.tensor(damping), right, EXAMPLES), ekfac


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cg", "preconditioned cg", "block cg", "astra tuned"])
def test_a_semidefinite_matrix_without_damping_ends_unconverged_with_finite_residuals(name, dtype):
    system, ekfac = rectified(dtype, 0.0)
    setting = Setting.__new__(Setting)
    setting.__dict__.update(system=system, ekfac=ekfac)
    found = SOLVERS[name](setting, tolerance=1e-6)
    assert not bool(found.converged.any())
    assert bool(torch.isfinite(found.residuals).all())
    assert bool(torch.isfinite(found.x).all())


@pytest.mark.parametrize("solve", [conjugate_gradients, block_conjugate_gradients])
def test_a_preconditioner_with_null_directions_is_not_called_indefinite(solve, setting):
    """The query that lies in them is given up; the others are solved in what is left."""
    units = torch.eye(len(setting.matrix), dtype=torch.float64)
    right = torch.stack([units[3], units[5] + units[7]])
    system = System(lambda v, _: 2 * v, torch.tensor(1.0), right, EXAMPLES)
    found = solve(system, precondition=lambda r: r * (torch.arange(r.shape[1]) != 3), tolerance=1e-9)
    assert found.converged.tolist() == [False, True]
    assert torch.allclose(found.x, torch.stack([0 * units[3], right[1] / 3]))
    assert found.residuals[-1].tolist() == pytest.approx([1, 0], abs=1e-9)


def test_a_preconditioner_that_is_indefinite_is_named(setting):
    with pytest.raises(InputError, match=r"the preconditioner is not positive definite: .* = -1 for the residual of query 0; raise"):
        conjugate_gradients(setting.system, precondition=torch.neg)


def test_queries_are_named_by_their_ids_in_the_run(setting):
    hessian = Setting("hessian", damping=1e-4)
    numbers = set()
    for first in (0, 64):
        with pytest.raises(InputError) as error:
            conjugate_gradients(replace(hessian.system, first=first), tolerance=1e-9)
        numbers.add(int(str(error.value).split("of query ")[1].split(";")[0]) - first)
    assert len(numbers) == 1
    with pytest.raises(InputError, match=r"of queries 64 to 69;"):
        block_conjugate_gradients(replace(hessian.system, first=64), hessian.ekfac, tolerance=1e-9)
    with pytest.raises(InputError, match=r"residual of query (6[4-9]) is"):
        neumann(replace(setting.system, first=64), step_size=50.0)
    right = setting.right.clone()
    right[1, 0] = torch.inf
    for solve in SOLVERS.values():
        changed = Setting.__new__(Setting)
        changed.__dict__.update(setting.__dict__, system=replace(setting.system, right=right, first=64))
        with pytest.raises(InputError, match="the gradient of query 65 has the norm inf"):
            solve(changed)


@pytest.mark.parametrize("name", [*SOLVERS, "sni on mini-batches"])
def test_a_product_that_is_not_finite_is_named(name, setting):
    changed = Setting.__new__(Setting)
    changed.__dict__.update(setting.__dict__, system=replace(setting.system, product=lambda v, _: v * torch.nan))
    with pytest.raises(InputError, match=r"products of C \+ damping with the vectors of .* are not finite; mend the model"):
        {**SOLVERS, **SHORT}[name](changed)


def test_a_schedule_that_finds_its_own_steps_refuses_others():
    with pytest.raises(InputError, match='batch_size = 64: schedule "tuned" takes all examples'):
        replace(NAMED["tuned"], batch_size=64)
    with pytest.raises(InputError, match=r"momentum = 0\.5"):
        replace(NAMED["tuned"], momentum=0.5)
