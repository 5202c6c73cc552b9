"""Every solver converges to the dense solution; what stops early is a known filter; a solve that was interrupted goes on bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tda import Categorical, InputError, flat
from tda.curvature.inverse import inverse_eigenvalues
from tda.directions import dense, query_gradients
from tda.modules import inspect
from tda.solvers.astra import NAMED, Schedule, astra
from tda.solvers.block import block_conjugate_gradients
from tda.solvers.cg import conjugate_gradients
from tda.solvers.operator import Operator
from tda.solvers.power import largest_eigenvalue
from tda.solvers.preconditioner import ekfac_preconditioner
from tda.solvers.sni import neumann
from tda.solvers.system import System, mini_batch
from tests.tda.pipeline import Given, fit

EXAMPLES, QUERIES, DAMPING = 40, 6, 1e-1


class Setting:
    """A small classifier, its damped GGN as a system, the dense solution, and EK-FAC."""

    def __init__(self, kind="ggn", damping=DAMPING, dtype=torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype).eval()
        data, queries = ([(torch.randn(5).to(dtype), torch.randint(0, 3, ())) for _ in range(n)] for n in (EXAMPLES, QUERIES))
        self.attributed = inspect(Given(model, Categorical(), data, queries), model, data)
        self.blocks = self.attributed.blocks
        gradients, _ = query_gradients(self.attributed, queries, range(QUERIES), batch_size=4)
        self.right = flat.flatten(self.blocks, [dense(g) for g in gradients])
        self.operator = Operator(self.attributed, data, kind, batch_size=EXAMPLES)
        self.matrix = self.operator.rows(0, self.operator.size).double()
        self.system = self.damped(damping)
        self.factors = fit(self.attributed, data, [range(EXAMPLES)], fisher="exact")
        self.ekfac = ekfac_preconditioner(self.blocks, self.factors, damping)
        self.exact = torch.linalg.solve(self.matrix + damping * torch.eye(len(self.matrix)), self.right.double().T).T

    def damped(self, damping):
        return System(self.operator.product, torch.tensor(damping, dtype=torch.float64), self.right, EXAMPLES)

    def error(self, x):
        return float(((x.double() - self.exact).norm(dim=1) / self.exact.norm(dim=1)).max())


@pytest.fixture(scope="module")
def setting():
    return Setting()


SOLVERS = {
    "cg": lambda s, **more: conjugate_gradients(s.system, **{"tolerance": 1e-9, "max_steps": 300, **more}),
    "preconditioned cg": lambda s, **more: conjugate_gradients(
        s.system, precondition=s.ekfac, **{"tolerance": 1e-9, "max_steps": 300, **more}
    ),
    "block cg": lambda s, **more: block_conjugate_gradients(s.system, s.ekfac, **{"tolerance": 1e-9, "max_steps": 100, **more}),
    "sni": lambda s, **more: neumann(s.system, **{"tolerance": 1e-8, "max_steps": 3000, **more}),
    "astra": lambda s, **more: astra(s.system, s.ekfac, schedule=Schedule(2000), **{"tolerance": 1e-9, **more}),
    "astra with momentum": lambda s, **more: astra(s.system, s.ekfac, schedule=Schedule(2000, momentum=0.5), **{"tolerance": 1e-9, **more}),
    "astra tuned": lambda s, **more: astra(s.system, s.ekfac, schedule=NAMED["tuned"], **{"tolerance": 1e-9, **more}),
}
#: The same with mini-batches, and few steps.
SHORT = {
    "sni on mini-batches": lambda s, **more: neumann(s.system, batch_size=7, max_steps=9, repeats=2, tolerance=1e-9, **more),
    "astra paper": lambda s, **more: astra(
        s.system, s.ekfac, schedule=Schedule(12, 8, of_damping=0.1, momentum=0.9, decay=0.5, decay_every=5), tolerance=1e-9, **more
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_converges_to_the_dense_solution(name, setting):
    found = SOLVERS[name](setting)
    assert setting.error(found.x) <= 1e-6
    assert bool(found.converged.all())
    wanted = (setting.system.residual(found.x).norm(dim=1) / setting.right.norm(dim=1)).double()
    assert torch.allclose(found.residuals[-1].double(), wanted, rtol=1e-6, atol=1e-14)
    assert found.residuals.shape == (len(found.evaluations), QUERIES)
    assert found.evaluations.dtype == torch.float64
    assert bool((found.evaluations.diff() >= 0).all())


@pytest.mark.parametrize("name", SOLVERS)
def test_at_the_start_no_solver_is_there_yet(name, setting):
    """The test above would prove nothing if the right-hand side itself, or EK-FAC's solution, were near enough."""
    assert setting.error(setting.right / DAMPING) > 0.5
    assert setting.error(setting.ekfac(setting.right)) > 0.05
    assert setting.error(torch.zeros_like(setting.right)) == 1


@pytest.mark.parametrize("name", [*SOLVERS, *SHORT])
def test_an_interrupted_solve_goes_on_bit_for_bit_from_any_state(name, setting):
    solve, states = {**SOLVERS, **SHORT}[name], []
    whole = solve(setting, on_step=lambda state: states.append({key: value.clone() for key, value in state.items()}))
    for state in states[:: max(1, len(states) // 4)]:
        again = solve(setting, state=state)
        assert torch.equal(again.x, whole.x)
        assert torch.equal(again.residuals, whole.residuals)
        assert torch.equal(again.evaluations, whole.evaluations)
        assert again.steps == whole.steps


@pytest.mark.parametrize("name", ["cg", "preconditioned cg", "sni", "astra"])
def test_queries_solved_together_are_those_solved_alone(name, setting):
    together = SOLVERS[name](setting).x
    for q in range(QUERIES):
        system = System(setting.operator.product, setting.system.damping, setting.right[q : q + 1], EXAMPLES)
        alone = Setting.__new__(Setting)
        alone.__dict__.update(setting.__dict__, system=system)
        assert float((SOLVERS[name](alone).x[0] - together[q]).norm() / together[q].norm()) < 1e-7


@pytest.mark.parametrize("name", SOLVERS)
def test_a_query_without_a_gradient_has_the_solution_zero(name, setting):
    right = setting.right.clone()
    right[2] = 0
    changed = Setting.__new__(Setting)
    changed.__dict__.update(setting.__dict__, system=System(setting.operator.product, setting.system.damping, right, EXAMPLES))
    found = SOLVERS[name](changed)
    assert torch.equal(found.x[2], torch.zeros_like(right[2]))
    assert bool(found.converged.all())


def test_full_batch_neumann_steps_are_the_closed_form_filter(setting):
    values, vectors = torch.linalg.eigh(setting.matrix)
    damped, steps = values + DAMPING, 25
    alpha = 0.7 / float(damped.max())
    wanted = setting.right @ vectors * ((1 - (1 - alpha * damped) ** steps) / damped) @ vectors.T
    found = neumann(setting.system, step_size=alpha, max_steps=steps, tolerance=0.0)
    assert torch.allclose(found.x, wanted, rtol=1e-10, atol=1e-14)
    assert float(found.evaluations[-1]) == (steps + 1) * EXAMPLES  # and one product for the last residual


def test_one_step_of_astra_from_zero_is_ekfac(setting):
    found = astra(setting.system, setting.ekfac, schedule=Schedule(1, step_size=1.0), start="zero", tolerance=1e-9)
    assert torch.equal(found.x, setting.ekfac(setting.right))
    blocks = flat.unflatten(setting.blocks, setting.right)
    for block, factor, g, x in zip(setting.blocks, setting.factors, blocks, flat.unflatten(setting.blocks, found.x), strict=True):
        basis = torch.kron(factor.basis_out[0], factor.basis_in[0])
        diagonal = factor.eigenvalues.flatten() + DAMPING
        wanted = torch.linalg.solve(basis @ torch.diag(diagonal) @ basis.T, g.flatten(1).T).T
        assert torch.allclose(x.flatten(1), wanted, rtol=1e-8, atol=1e-12), block.name


def test_the_published_schedules_are_those_of_the_paper(setting):
    sizes = []
    plan = NAMED["paper"]

    def product(x, ids=None):
        sizes.append(EXAMPLES if ids is None else len(ids))
        return torch.zeros_like(x)

    # Without curvature, the residual is b - damping x, and the path of each entry is known.
    system = System(product, setting.system.damping, setting.right, 1437)
    found = astra(system, lambda v: v, schedule=plan, start="zero", tolerance=0.0)
    x, u = torch.zeros_like(setting.right), torch.zeros_like(setting.right)
    for k in range(200):
        u = 0.9 * u + setting.right - DAMPING * x
        x = x + 0.1 * DAMPING * 0.5 ** (k // 50) * u
    assert torch.allclose(found.x, x, rtol=1e-12)
    assert sizes.count(256) == 200


def test_mini_batches_cover_every_epoch_once_and_follow_the_seed():
    first = [i for step in range(5) for i in mini_batch(23, 4, 7, step)]
    assert len(first) == len(set(first)) == 20
    assert mini_batch(23, 4, 7, 5) != mini_batch(23, 4, 7, 0)
    assert mini_batch(23, 4, 8, 0) != mini_batch(23, 4, 7, 0)
    assert mini_batch(23, 4, 7, 3) == mini_batch(23, 4, 7, 3)
    assert mini_batch(23, 23, 7, 0) is None
    assert mini_batch(23, None, 7, 0) is None


def test_averaged_runs_on_mini_batches_come_nearer_to_full_batches(setting):
    options = {"step_size": 0.2, "max_steps": 60, "tolerance": 0.0}
    full = neumann(setting.system, **options).x
    once, often = (neumann(setting.system, batch_size=4, repeats=n, **options) for n in (1, 16))
    assert float((often.x - full).norm()) < 0.7 * float((once.x - full).norm())
    assert float(often.evaluations[-1]) > 10 * float(once.evaluations[-1])


@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_largest_eigenvalue_is_that_of_the_dense_matrix(preconditioned, setting):
    matrix = setting.matrix
    if preconditioned:
        matrix = setting.ekfac(torch.eye(len(matrix), dtype=torch.float64)) @ matrix
    wanted = float(torch.linalg.eigvals(matrix).real.max())
    value, products = largest_eigenvalue(
        setting.operator.product, len(matrix), precondition=setting.ekfac if preconditioned else None, accuracy=1e-10
    )
    assert value == pytest.approx(wanted, rel=1e-8)
    assert products <= 40


def test_an_indefinite_hessian_is_refused_with_the_query_and_the_way_out():
    setting = Setting("hessian", damping=1e-4)
    assert float(torch.linalg.eigvalsh(setting.matrix)[0]) < -1e-3
    with pytest.raises(
        InputError, match=r'not positive definite: .* of query \d+; raise the damping or, if it is a Hessian, take curvature = "ggn"'
    ):
        conjugate_gradients(setting.system, tolerance=1e-9)
    with pytest.raises(InputError, match="not positive definite"):
        block_conjugate_gradients(setting.system, setting.ekfac, tolerance=1e-9)


def test_a_damped_hessian_is_solved():
    setting = Setting("hessian", damping=1.0)
    assert setting.error(conjugate_gradients(setting.system, tolerance=1e-9).x) < 1e-8


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_step_that_is_too_large_is_named_with_one_that_would_do(batch_size, setting):
    with pytest.raises(InputError, match=r"sni diverged at step \d+: .* step_size = 50 is too large, [\d.]+ would do"):
        neumann(setting.system, step_size=50.0, batch_size=batch_size, max_steps=500)
    with pytest.raises(InputError, match=r"astra diverged at step \d+: .* step_size = 50 is too large, [\d.]+ would do"):
        astra(setting.system, setting.ekfac, schedule=Schedule(500, batch_size, step_size=50.0))


@pytest.mark.parametrize("name", ["cg", "block cg", "astra tuned"])
def test_what_float32_cannot_reach_ends_unconverged(name):
    setting = Setting(damping=1e-4, dtype=torch.float32)
    limit = {} if name == "astra tuned" else {"max_steps": 2000}
    found = SOLVERS[name](setting, tolerance=1e-12, **limit)
    assert not bool(found.converged.any())
    assert found.steps < 2000
    assert setting.error(found.x) < 1e-2


def test_queries_that_depend_on_one_another_are_solved(setting):
    right = torch.cat([setting.right[:2], setting.right[:1] * 3, setting.right[1:2] - setting.right[:1]])
    system = System(setting.operator.product, setting.system.damping, right, EXAMPLES)
    found = block_conjugate_gradients(system, setting.ekfac, tolerance=1e-9)
    wanted = torch.cat([setting.exact[:2], setting.exact[:1] * 3, setting.exact[1:2] - setting.exact[:1]])
    assert torch.allclose(found.x, wanted, rtol=1e-6, atol=1e-9)


def test_damping_may_differ_by_coordinate(setting):
    each = [0.1 * float(factor.eigenvalues.mean()) for factor in setting.factors]
    damping = torch.tensor(each, dtype=torch.float64).repeat_interleave(torch.tensor([block.size for block in setting.blocks]))
    system = System(setting.operator.product, damping, setting.right, EXAMPLES)
    found = conjugate_gradients(system, tolerance=1e-10)
    wanted = torch.linalg.solve(setting.matrix + torch.diag(damping), setting.right.T).T
    assert float((found.x - wanted).norm() / wanted.norm()) < 1e-8
    heuristic = ekfac_preconditioner(setting.blocks, setting.factors, "heuristic")
    for factor, x, g in zip(
        setting.factors,
        flat.unflatten(setting.blocks, heuristic(setting.right)),
        flat.unflatten(setting.blocks, setting.right),
        strict=True,
    ):
        turned = factor.basis_out.transpose(1, 2) @ g @ factor.basis_in * inverse_eigenvalues(factor, "ekfac", "heuristic")
        assert torch.allclose(x, factor.basis_out @ turned @ factor.basis_in.transpose(1, 2), rtol=1e-8, atol=1e-12)


def test_a_schedule_that_finds_its_own_steps_refuses_others():
    with pytest.raises(InputError, match='batch_size = 64: schedule "tuned" takes all examples'):
        replace(NAMED["tuned"], batch_size=64)
    with pytest.raises(InputError, match=r"momentum = 0\.5"):
        replace(NAMED["tuned"], momentum=0.5)
