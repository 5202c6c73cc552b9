"""Baselines through the tasks of a run, against dense float64 computations of their definitions."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tasks import directions, layout, projection, retraining, scores
from tasks.plan import Plan
from tasks.subject import open_subject
from tasks.training import read_trajectory
from tda import location
from tda.directions import Dense
from tda.errors import InputError
from tda.evaluation.retraining import retrain
from tda.flat import unflatten
from tda.methods import parse
from tda.methods.random_scores import normals
from tda.projection import Projection, project
from tests.flows.runs import PROBLEM, objects
from tests.tasks.jobs import planned
from tests.tasks.test_directions import training_gradients
from tests.tda.pipeline import relative

METHODS = """
problem = "tiny.py:Tiny"
shard_size = 6
query_block = 3
[[methods]]
name = "graddot"
[[methods]]
name = "random"
[[methods]]
name = "representation"
[[methods]]
name = "representation"
label = "l2"
similarity = "l2"
layer = "0"
[[methods]]
name = "tracin"
checkpoints = 3
[[methods]]
name = "trak"
projection_dim = 11
damping = 1e-3
[[methods]]
name = "trak"
label = "trak2"
projection_dim = 11
damping = 1e-3
models = 2
[[methods]]
name = "trak"
label = "layers"
projection_dim = 11
scope = "layer"
damping = 1e-3
[[methods]]
name = "dtda"
alpha = 0.4
subsets = 12
seeds = 2
"""
# A `fit` that trains on any subset.
SUBSETS = PROBLEM.replace("dataset.x[i], dataset.y[i]", "dataset[i]")
RANDOM, REPRESENTATION, L2, TRACIN, TRAK, TRAK2, LAYERS, DTDA = range(1, 9)


def scored(plan: Plan, url: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Influence (method, query, train) and self-influence (method, train), by a run's tasks."""
    for fit in plan.first.fits.values():
        if isinstance(fit, projection.ProjectionJob):
            for part in reversed(range(fit.parts)):
                projection.sum_part((fit, part))
            projection.finish(fit)
        else:
            retraining.create(fit)
            for piece in retraining.pieces(fit):
                retraining.retrain_piece(piece)
            retraining.finish(fit)
    job = plan.placed(url).first.scores
    for each in job.methods:
        if not layout.is_complete(each.directions.url):
            for block in range(each.directions.blocks):
                directions.make_directions((each.directions, block))
            directions.finish(each.directions)
    scores.create_results(job, {}, {})
    for shard, block in product(*map(range, job.shape)):
        scores.score_shard((job, shard, block))
    for shard in range(job.shape[0]):
        scores.verify_shard((job, shard))
    group = location.open_group(job.results)
    return torch.from_numpy(group["influence"][...]).double(), torch.from_numpy(group["self_influence"][...]).double()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("run")
    return planned(folder / "config", f"{folder}/store", text=METHODS, problem=SUBSETS)


@pytest.fixture(scope="module")
def found(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    return scored(plan, f"file://{tmp_path_factory.mktemp('results')}/run")


def query_gradients(subject) -> torch.Tensor:
    """(query, D): as for training examples, of the queries."""
    opened = open_subject(subject)
    return training_gradients_of(opened.attributed, opened.query)


def training_gradients_of(attributed, data) -> torch.Tensor:
    from tda.blocks import to_matrix

    rows, parameters = [], dict(attributed.model.named_parameters())
    for i in range(len(data)):
        x, y = data[i]
        loss = nn.functional.cross_entropy(attributed.model(x[None]), y[None])
        each = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        rows.append(torch.cat([to_matrix(block, each).flatten() for block in attributed.blocks]))
    return torch.stack(rows)


def test_tracin_is_the_sum_over_checkpoints_of_time_times_inner_products(plan: Plan, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    scored = plan.first.scores.methods[TRACIN]
    trajectory = read_trajectory(plan.first.subject.checkpoint)
    horizons = [segment.horizon for segment in scored.directions.segments]
    assert sum(horizons) == pytest.approx(trajectory.saved[-1].time)  # every step is counted, once
    assert len({subject.weights for (subject,) in scored.meets}) == 3
    wanted, own = torch.zeros(5, 23, dtype=torch.float64), torch.zeros(23, dtype=torch.float64)
    for horizon, (subject,) in zip(horizons, scored.meets, strict=True):
        train = training_gradients(subject)
        wanted -= horizon * query_gradients(subject) @ train.T / 23
        own -= horizon * train.square().sum(1) / 23
    assert relative(found[0][TRACIN], wanted) < 1e-6
    assert relative(found[1][TRACIN], own) < 1e-6


@pytest.mark.parametrize(("place", "checkpoints"), [(TRAK, 1), (TRAK2, 2), (LAYERS, 1)])
def test_trak_averages_over_checkpoints_what_it_is_at_each(
    plan: Plan, found: tuple[torch.Tensor, torch.Tensor], place: int, checkpoints: int
) -> None:
    scored = plan.first.scores.methods[place]
    assert [len(met) for met in scored.meets] == [1] * checkpoints
    wanted, own = torch.zeros(5, 23, dtype=torch.float64), torch.zeros(23, dtype=torch.float64)
    for (subject,) in scored.meets:
        attributed = open_subject(subject).attributed
        eye = torch.eye(sum(block.size for block in attributed.blocks), dtype=torch.float64)
        columns = project(Projection(11, 0, place == LAYERS), attributed.blocks, [Dense(m) for m in unflatten(attributed.blocks, eye)])
        train = training_gradients(subject)
        targets = torch.stack([open_subject(subject).train[i][1] for i in range(23)])
        inputs = torch.stack([open_subject(subject).train[i][0] for i in range(23)])
        rest = 1 - attributed.model(inputs).softmax(1)[range(23), targets].detach()
        for P in columns:  # (D, k)
            phi = train / rest[:, None] @ P
            curvature = phi.T @ phi / 23 + 1e-3 * torch.eye(P.shape[1], dtype=torch.float64)
            own -= torch.einsum("ik,kl,il->i", train @ P, torch.linalg.inv(curvature), train @ P) / 23 / checkpoints
            wanted -= query_gradients(subject) @ P @ torch.linalg.inv(curvature) @ (train @ P).T / 23 / checkpoints
    assert relative(found[0][place], wanted) < 1e-6
    assert relative(found[1][place], own) < 1e-6


def test_a_projection_that_is_fitted_is_not_fitted_again_and_a_half_done_one_is(
    plan: Plan, found: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert len(found) == 2
    job = next(iter(plan.first.fits.values()))
    before = objects(job.url)
    assert set(before) == {"spectra.safetensors", "complete.json"}
    projection.sum_part((job, 0))
    projection.finish(job)
    assert objects(job.url) == before
    Path(f"{job.url}/complete.json".removeprefix("file://")).unlink()
    for part in range(job.parts):
        projection.sum_part((job, part))
    projection.finish(job)
    assert objects(job.url) == before


def test_the_mean_shift_is_that_of_models_trained_with_and_without_the_example(
    plan: Plan, found: tuple[torch.Tensor, torch.Tensor]
) -> None:
    (job,) = (fit for fit in plan.first.fits.values() if isinstance(fit, retraining.RetrainJob))
    assert (job.alphas, job.subsets, job.seeds) == ((0.4,), 12, 2)
    assert job.seed < 0  # no evaluation's
    problem = open_subject(plan.first.subject).attributed.problem
    truth = retraining.load_truth(job.url)
    for query, i in ((0, 0), (3, 7), (4, 22)):
        having: dict[bool, list[float]] = {True: [], False: []}
        for mask, seeds in zip(truth.masks[0], truth.training_seed[0], strict=True):
            each = [retrain(problem, problem.train_data(), np.flatnonzero(mask).tolist(), int(seed)) for seed in seeds]
            x, y = problem.query_data()[query]
            losses = [nn.functional.cross_entropy(model(x[None]), y[None]).item() for model in each]
            having[bool(mask[i])].append(float(np.mean(losses)))
        wanted = 0.4 * (np.mean(having[True]) - np.mean(having[False]))
        assert float(found[0][DTDA][query, i]) == pytest.approx(wanted, rel=1e-5)


def test_an_example_that_no_subset_or_every_one_has_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    text = METHODS.replace("subsets = 12", "subsets = 3")
    with pytest.raises(InputError, match=r"training example \d+ is in (all|none) of the 3 subsets.*take more subsets"):
        planned(tmp_path / "config", f"{tmp_path}/store", text=text, problem=SUBSETS)
    assert not list(tmp_path.rglob("retraining"))


def test_random_scores_are_the_same_for_any_shards_and_nothing_else_moves_them(
    plan: Plan, found: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    wanted = torch.stack([normals(0, query, range(23)) for query in range(5)])
    assert torch.equal(found[0][RANDOM], wanted.float().double())
    text = METHODS.replace("shard_size = 6\nquery_block = 3", "shard_size = 5\nquery_block = 2\nbatch_size = 4")
    again = scored(planned(tmp_path / "config", f"{tmp_path}/store", text=text, problem=SUBSETS), f"file://{tmp_path}/run")
    assert torch.equal(again[0][RANDOM], found[0][RANDOM])
    other = scored(planned(tmp_path / "config", f"{tmp_path}/store", "seed=1", text=text, problem=SUBSETS), f"file://{tmp_path}/other")
    assert torch.equal(other[0][RANDOM], torch.stack([normals(1, query, range(23)) for query in range(5)]).float().double())


def test_random_numbers_are_normal_and_belong_to_their_places() -> None:
    whole = normals(3, 7, range(20_000))
    assert torch.equal(normals(3, 7, [5, 19_999, 4096]), whole[[5, 19_999, 4096]])
    assert torch.equal(normals(3, 7, range(501, 777)), whole[501:777])
    assert abs(float(whole.mean())) < 4 / 20_000**0.5
    assert abs(float(whole.square().mean()) - 1) < 4 * (2 / 20_000) ** 0.5
    for other in (normals(3, 8, range(20_000)), normals(4, 7, range(20_000))):
        assert abs(float(np.corrcoef(whole, other)[0, 1])) < 4 / 20_000**0.5


def test_representations_are_compared_where_the_last_layer_or_the_named_one_takes_them(
    plan: Plan, found: tuple[torch.Tensor, torch.Tensor]
) -> None:
    opened = open_subject(plan.first.subject)
    model = opened.attributed.model
    data = [torch.stack([each[i][0] for i in range(len(each))]) for each in (opened.query, opened.train)]
    query, train = (model[:3](x).detach() for x in data)  # what is given to the last of the four modules
    wanted = -torch.stack([nn.functional.cosine_similarity(q[None], train) for q in query])
    assert relative(found[0][REPRESENTATION], wanted) < 1e-6
    assert relative(found[0][L2], torch.cdist(*data, compute_mode="donot_use_mm_for_euclid_dist")) < 1e-6


def test_direct_scores_say_nothing_of_layers_or_of_an_example_on_itself(found: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.isfinite(found[1]).all(1).tolist() == [True, False, False, False, True, True, True, True, False]


@pytest.mark.parametrize(("text", "option"), [('name = "tracin"', "checkpoints = 5"), ('name = "trak"\nmodels = 30', "models = 30")])
def test_too_few_checkpoints_of_the_training_are_told_with_the_method(tmp_path: Path, text: str, option: str) -> None:
    few = SUBSETS.replace("if step % 3 == 0 or", "if")
    with pytest.raises(InputError, match=rf"^(tracin|trak): {option}: the training reported only 1 checkpoint"):
        planned(tmp_path / "config", f"{tmp_path}/store", text=f'problem = "tiny.py:Tiny"\n[[methods]]\n{text}', problem=few)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(plan: Plan) -> None:
    attributed = open_subject(plan.first.subject).attributed
    with pytest.raises(InputError, match=r"representation needs layer '2' among the attributed ones; there is 0, 3"):
        parse({"name": "representation", "layer": "2"}).block(attributed)


@pytest.mark.parametrize(
    ("text", "words"),
    [({"name": "tracin", "checkpoints": 0}, "checkpoints = 0"), ({"name": "representation", "similarity": "sine"}, "similarity = 'sine'")],
)
def test_options_out_of_range_are_refused(text: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(text)
