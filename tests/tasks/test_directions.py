"""Directions of every kind of method: equal where the mathematics says so, the same bytes after an interruption, met where they belong."""

from itertools import product
from pathlib import Path

import pytest
import torch

from tasks import dense, directions, scores
from tasks.factors import FactorJob
from tasks.plan import Plan
from tasks.tensors import read_tensors
from tda import location
from tda.directions import dense as matrices
from tests.flows.runs import objects
from tests.tasks.jobs import fit, planned
from tests.tda.pipeline import relative

METHODS = """
problem = "tiny.py:Tiny"
shard_size = 6
query_block = 3
[[methods]]
name = "ggn"
damping = 0.01
[[methods]]
name = "cg"
damping = 0.01
tolerance = 1e-10
[[methods]]
name = "cg"
label = "pcg"
damping = 0.01
tolerance = 1e-10
preconditioner = "ekfac"
[[methods]]
name = "astra"
damping = 0.01
tolerance = 1e-9
max_steps = 500
[[methods]]
name = "sni"
damping = 0.01
tolerance = 1e-9
max_steps = 20000
batch_size = "full"
[[methods]]
name = "ekfac"
damping = 0.01
[[methods]]
name = "astra"
label = "one step"
schedule = "paper"
damping = 0.01
max_steps = 1
step_size = 1.0
momentum = 0.0
start = "zero"
batch_size = "full"
[[methods]]
name = "source"
segments = 2
"""


def fitted(plan: Plan) -> Plan:
    for job in plan.first.fits.values():
        if isinstance(job, FactorJob):
            fit(job)
        else:
            dense.create(job)
            for task in dense.row_tasks(job):
                dense.rows(task)
            for task in dense.decompose_tasks(job):
                dense.decompose(task)
            dense.finish(job)
    return plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("run")
    plan = fitted(planned(folder / "config", f"{folder}/store", text=METHODS.replace('label = "one step"', 'label = "one"')))
    for scored in plan.first.scores.methods:
        for block in range(scored.directions.blocks):
            directions.make_directions((scored.directions, block))
        directions.finish(scored.directions)
    return plan


def made(plan: Plan, title: str) -> torch.Tensor:
    """All queries' directions (query, D) of a method's first pass."""
    job = next(s.directions for s in plan.first.scores.methods if s.directions.parsed().title == title)
    return torch.cat([matrices(d).flatten(1) for d in directions.read_directions(job, range(job.queries)).passes[0]], 1)


@pytest.mark.parametrize("title", ["cg", "pcg", "astra", "sni"])
def test_every_solver_comes_to_the_dense_solve(plan: Plan, title: str) -> None:
    assert relative(made(plan, title), made(plan, "ggn")) < 1e-6
    assert relative(made(plan, "ekfac"), made(plan, "ggn")) > 1e-2


def test_directions_are_read_for_any_queries_whatever_blocks_they_were_made_in(plan: Plan) -> None:
    for scored in plan.first.scores.methods:
        whole = directions.read_directions(scored.directions, range(5))
        part = directions.read_directions(scored.directions, range(2, 4))
        assert torch.equal(part.measurement, whole.measurement[2:4])
        for a, b in zip(part.passes, whole.passes, strict=True):
            assert all(torch.equal(matrices(x), matrices(y)[2:4]) for x, y in zip(a, b, strict=True))


def test_one_step_of_astra_from_zero_is_ekfac(plan: Plan) -> None:
    assert relative(made(plan, "one"), made(plan, "ekfac")) < 1e-12


def test_residuals_are_told_query_by_query(plan: Plan) -> None:
    job = plan.first.scores.methods[1].directions
    (solve,) = directions.told(job)[0]["solves"]
    assert len(solve["residual"]) == len(solve["evaluations"])
    assert {len(row) for row in solve["residual"]} == {3}
    assert all(value <= 1e-10 for value in solve["residual"][-1])
    assert solve["converged"] == [True] * 3


@pytest.mark.parametrize("place", [1, 3, 4])
def test_an_interrupted_solve_goes_on_to_the_same_bytes(plan: Plan, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = plan.first.scores.methods[place].directions
    before = objects(job.url)
    for name in ("safetensors", "json"):
        Path(job.place("queries", 0, name).removeprefix("file://")).unlink()
    monkeypatch.setattr(directions, "STATE_SECONDS", 0.0)
    write, states = directions.write_tensors, []

    def interrupted(url: str, tensors: dict[str, torch.Tensor]) -> None:
        write(url, tensors)
        states.append(url)
        if len(states) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(directions, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        directions.make_directions((job, 0))
    assert set(states) == {job.place("state", 0)}
    assert len(read_tensors(states[0])) > 1
    monkeypatch.undo()
    directions.make_directions((job, 0))
    assert objects(job.url) == before


def test_scores_meet_the_gradients_of_the_checkpoints_that_they_belong_to(plan: Plan, tmp_path: Path) -> None:
    job = plan.placed(f"file://{tmp_path}/run").first.scores
    source = job.methods[-1]
    assert [len(met) for met in source.meets] == [2, 2]
    assert job.subjects[0] == job.subject
    assert len(job.subjects) in (4, 5)
    scores.create_results(job, {}, {})
    for shard, block in product(*map(range, job.shape)):
        scores.score_shard((job, shard, block))
    for shard in range(job.shape[0]):
        scores.verify_shard((job, shard))
    group = location.open_group(job.results)
    found = torch.from_numpy(group["influence"][-1])
    wanted = torch.zeros(5, 23, dtype=torch.float64)
    read = directions.read_directions(source.directions, range(5))
    for passed, met in zip(read.passes, source.meets, strict=True):
        rows = torch.cat([matrices(d).flatten(1) for d in passed], 1)
        for subject in met:
            wanted += rows @ training_gradients(subject).T / 23 / len(met)
    assert relative(found, wanted) < 1e-6
    own = torch.from_numpy(group["self_influence"][...])
    assert torch.isfinite(own).all(1).tolist() == [True, False, False, False, False, True, False, False]


def training_gradients(subject) -> torch.Tensor:
    """(train, D) by autograd, one example at a time."""
    from tasks.subject import open_subject
    from tda.blocks import to_matrix

    opened = open_subject(subject)
    attributed, model = opened.attributed, opened.attributed.model
    rows = []
    for i in range(len(opened.train)):
        x, y = opened.train[i]
        loss = torch.nn.functional.cross_entropy(model(x[None]), y[None])
        found = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
        rows.append(torch.cat([to_matrix(block, found).flatten() for block in attributed.blocks]))
    return torch.stack(rows)
