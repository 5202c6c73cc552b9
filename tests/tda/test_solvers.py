"""Every solver converges to the dense solution; what stops early is a known filter; a solve that was interrupted goes on bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from tda.solvers.system import System, Trace, mini_batch
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


def test_a_schedule_that_finds_its_own_steps_refuses_others():
    with pytest.raises(InputError, match='batch_size = 64: schedule "tuned" takes all examples'):
        replace(NAMED["tuned"], batch_size=64)
    with pytest.raises(InputError, match=r"momentum = 0\.5"):
        replace(NAMED["tuned"], momentum=0.5)
