"""Every solver converges to the dense solution; what stops early is a known filter; a solve that was interrupted goes on bit for bit."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tda import flat
from tda.curvature.inverse import inverse_eigenvalues
from tda.solvers.astra import NAMED, Schedule, astra
from tda.solvers.block import block_conjugate_gradients
from tda.solvers.cg import conjugate_gradients
from tda.solvers.power import extreme_eigenvalues
from tda.solvers.preconditioner import ekfac_preconditioner
from tda.solvers.sni import neumann
from tda.solvers.system import System, Trace, mini_batch
from tests.tda.systems import DAMPING, EXAMPLES, QUERIES, SHORT, SOLVERS, Setting


@pytest.fixture(scope="module")
def setting():
    return Setting()


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
    _, value, products = extreme_eigenvalues(
        setting.operator.product, len(matrix), precondition=setting.ekfac if preconditioned else None, accuracy=1e-10
    )
    assert value == pytest.approx(wanted, rel=1e-8)
    assert products <= 40


def test_a_damped_hessian_is_solved():
    setting = Setting("hessian", damping=1.0)
    assert setting.error(conjugate_gradients(setting.system, tolerance=1e-9).x) < 1e-8


def test_moments_told_before_stay_as_they_are_while_more_come():
    trace, views = Trace(2, torch.zeros(0, dtype=torch.float64)), []
    for k in range(50):
        trace.add(torch.tensor([k, -k]), k)
        views.append(trace.state())
    for k, view in enumerate(views):
        assert view["residuals"].tolist() == [[i, -i] for i in range(k + 1)]
        assert view["evaluations"].tolist() == list(range(k + 1))
    assert len({view["residuals"].data_ptr() for view in views}) <= 3  # 16, 32 and 64 moments: not one copy per moment


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those made since it began; what an operation needs within itself is not seen."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self.alive.values()))
        return found


@pytest.mark.parametrize(("name", "vectors"), [("cg", 4), ("preconditioned cg", 4), ("tuned", 5), ("sni", 2), ("momentum", 4)])
def test_a_solve_takes_few_vectors_of_memory_for_each_query(name, vectors, monkeypatch):
    """Besides the right-hand side. Copies of all vectors at each step, as a state that never changes needs, would be twice as many."""
    monkeypatch.setattr("tda.solvers.system.PIECE_BYTES", 1)
    values = torch.logspace(-3, 0, 50_000)
    inverse = 1 / (values.clamp(min=0.05) + 0.01)
    right = torch.randn(8, len(values), generator=torch.Generator().manual_seed(0))
    system = System(lambda v, _: v * values, torch.tensor(0.01), right, 100)
    solve = {
        "cg": lambda: conjugate_gradients(system, tolerance=1e-6, max_steps=6, on_step=dict),
        "preconditioned cg": lambda: conjugate_gradients(system, precondition=lambda v: v * inverse, max_steps=6, on_step=dict),
        "tuned": lambda: astra(system, lambda v: v * inverse, schedule=NAMED["tuned"], tolerance=1e-2, on_step=dict),
        "sni": lambda: neumann(system, step_size=0.9, max_steps=6, on_step=dict),
        "momentum": lambda: astra(system, lambda v: v * inverse, schedule=Schedule(6, 9, step_size=0.05, momentum=0.9), on_step=dict),
    }[name]
    assert system.scale.shape == (8,)
    with Peak() as peak:
        solve()
    assert vectors - 0.5 < peak.bytes / right.nbytes < vectors + 0.5


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
