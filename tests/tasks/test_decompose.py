"""A study's point: what is decided before it is computed, what is measured, and what the page says of it."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from scipy.stats import spearmanr

import tda
from tasks import decompose, decompose_lds, decompose_measure, decompose_results, dense, factors, layout, retraining, training
from tasks.decompose import Point, PointJob, Study
from tasks.decompose_claims import claims
from tasks.decompose_page import page
from tasks.subject import open_subject
from tasks.tensors import read_tensors
from tda import study as results
from tda.blocks import to_matrix
from tda.curvature.spectrum import Inverse, inverse_values
from tda.errors import InputError
from tests.flows.runs import PROBLEM

PINV = {"damping": 0.0, "pinv": 1e-4, "relative": False, "negative": "drop"}
DAMPED = {"damping": 0.01, "pinv": None, "relative": False, "negative": "abs"}
#: The tiny problem, of any width and number of passes over its data.
WIDE = PROBLEM.replace("seed=1):", "seed=1, width=4, epochs=2):\n        self.width, self.epochs = width, epochs", 1)
WIDE = WIDE.replace(
    "nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)", "nn.Linear(6, self.width), nn.Tanh(), nn.Linear(self.width, 3)"
)
WIDE = WIDE.replace("enumerate(order.tolist(), 1)", "enumerate(order.tolist() * self.epochs, 1)")
WIDE = WIDE.replace("step == len(order)", "step == len(order) * self.epochs")
WIDE = WIDE.replace("dataset.x[i], dataset.y[i]", "dataset[i]")
assert (WIDE.count("self.width"), WIDE.count("self.epochs")) == (3, 3)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.py").write_text(WIDE)
    inverses = (("pinv", json.dumps(PINV)), ("damped", json.dumps(DAMPED)))
    sweep = json.dumps({"width": [3, 4, 40], "epochs": [1, 3]})  # 33, 43 and 403 parameters
    return Study(f"{folder}/tiny.py:Tiny", "{}", sweep, (1.0,), inverses, f"file://{folder}/store", 0, ("*",), (), 500_000, 8)


@pytest.fixture(scope="module")
def points(study: Study) -> list[Point]:
    return decompose.examine(study)


@pytest.fixture(scope="module")
def measured(study: Study, points: list[Point]) -> list[PointJob | None]:
    return [None if point.refused else compute(study, point) for point in points]


@pytest.fixture(scope="module")
def opened(study: Study, points: list[Point], measured: list[PointJob | None]) -> results.Study:
    url = decompose_results.study_url(study.store, "s")
    manifest = decompose_results.manifest(study, points, "s", "2026-01-01T00:00:00+00:00", {})
    decompose_results.write_results(url, study, points, [() if job is None else (job.url,) for job in measured])
    decompose_results.complete(url, manifest | {"timings": {}})
    return tda.open_study(study.store)


def compute(study: Study, point: Point) -> PointJob:
    training.train(point.training)
    job = decompose.job_of(study, point)
    if layout.is_complete(job.url):
        return job
    fit(job.factors)
    for each in job.spectra:
        dense.create(each)
        for rows in dense.row_tasks(each):
            dense.rows(rows)
        for block in dense.decompose_tasks(each):
            dense.decompose(block)
        dense.finish(each)
    decompose_measure.measure(job)
    return job


def fit(job: factors.FactorJob) -> None:
    factors.create_factors(job)
    for sums in ("covariance", "eigenvalues"):
        for node in factors.leaves(job, sums):
            factors.sum_shard(node)
        for level in factors.levels(job, sums):
            for node in level:
                factors.reduce_node(node)
        for layer in range(2 if sums == "covariance" else 0):
            factors.decompose_layer((job, layer))
    factors.finish_factors(job)


def test_points_are_all_combinations_and_too_large_ones_are_refused_with_their_bytes(points: list[Point]) -> None:
    assert [json.loads(point.swept) for point in points] == [{"width": w, "epochs": e} for w in (3, 4, 40) for e in (1, 3)]
    assert [point.parameters for point in points] == 2 * [33] + 2 * [43] + 2 * [403]
    assert [bool(point.refused) for point in points] == 4 * [False] + 2 * [True]
    assert points[-1].bytes == decompose.measured_bytes((280, 123), 23, 5, 2)
    assert points[-1].refused == "takes 7.03 MiB, memory_limit is 0.477 MiB"


def test_the_memory_is_that_of_decomposing_or_of_measuring_whichever_is_more() -> None:
    def matrices(layers: tuple[int, ...], examples: int) -> float:
        return decompose.measured_bytes(layers, examples, 100, 2) / (8 * sum(layers) ** 2)

    assert 5.7 < matrices((4160, 650), 10) < 5.9, "of some thousand parameters, reading the chunks takes as much as what is read"
    assert 3 < matrices((30_000,), 1000) < 4, "of very many, decomposing takes more: four"
    assert matrices((1000,), 50_000) > 50, "of many examples, their gradients"
    assert zarr.config.get("async.concurrency") == decompose.READ


def test_a_study_of_nothing_but_too_large_points_is_refused(study: Study) -> None:
    with pytest.raises(InputError, match=r"every point .* too large: the smallest has 33 parameters and takes .*; raise memory_limit"):
        decompose.examine(replace(study, memory_limit=1000))


def test_options_that_do_not_fit_are_refused_with_their_point(study: Study) -> None:
    with pytest.raises(InputError, match=r"problem_options.*depth.*\(with depth 2\)"):
        decompose.examine(replace(study, sweep='{"depth": [2]}'))


def test_what_is_stored_is_that_of_explicit_matrices(study: Study, points: list[Point], measured: list[PointJob | None], opened) -> None:
    at = opened.results.sel(width=4, epochs=3)
    job = measured[3]
    assert job is not None
    hessian, ggn = (matrix(each) for each in job.spectra[:2])
    for label, options in (("pinv", PINV), ("damped", DAMPED)):
        H, G = (inverted(m, Inverse(**options), psd=psd) for m, psd in ((hessian, False), (ggn, True)))
        found = at.error.sel(inverse=label, definition="inverse", reference="hessian", rung="ggn").item()
        assert found == pytest.approx(float((H - G).norm() / H.norm()), rel=1e-6)
    assert at.matrix_error.sel(reference="hessian", rung="ggn").item() == pytest.approx(float((hessian - ggn).norm() / hessian.norm()))
    edges = np.cumsum([0, *points[3].sizes])
    off = ggn.clone()
    for a, b in pairwise(edges):
        off[a:b, a:b] = 0
    assert at.off_block_mass.sel(reference="ggn").item() == pytest.approx(float(off.norm() / ggn.norm()))
    assert at.error_share.sel(reference="hessian", inverse="pinv", definition="inverse").sum().item() == pytest.approx(1)


def matrix(job: dense.DenseJob) -> torch.Tensor:
    (found,) = dense.load_spectra(job.url)
    return found.vectors @ torch.diag(found.values) @ found.vectors.T


def inverted(m: torch.Tensor, inverse: Inverse, *, psd: bool) -> torch.Tensor:
    s, v = torch.linalg.eigh(m)
    return v @ torch.diag(inverse_values(s, inverse, psd=psd)) @ v.T


@pytest.fixture(scope="module")
def scores(measured: list[PointJob | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-(1/N) g_q^T C+ g_i under DAMPED at the first point by the Hessian and by the GGN, and the mean gradient; autograd by example."""
    job = measured[0]
    assert job is not None
    data = open_subject(job.subject)
    attributed = data.attributed
    names, parameters = zip(*attributed.model.named_parameters(), strict=True)

    def gradients(dataset):
        rows = []
        for x, y in (dataset[i] for i in range(len(dataset))):
            loss = torch.nn.functional.cross_entropy(attributed.model(x[None].double()), y[None])
            found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
            rows.append(torch.cat([to_matrix(b, found).flatten() for b in attributed.blocks]))
        return torch.stack(rows)

    train, query = gradients(data.train), gradients(data.query)
    solved = [inverted(matrix(each), Inverse(**DAMPED), psd=psd) for each, psd in zip(job.spectra[:2], (False, True), strict=True)]
    return *(-query @ inverse @ train.T / len(train) for inverse in solved), train.mean(0)


def test_the_agreement_of_the_scores_is_that_of_scores_by_hand(scores, opened) -> None:
    wanted = np.mean([spearmanr(a, b).statistic for a, b in zip(*scores[:2], strict=True)])
    at = opened.results.sel(width=3, epochs=1)
    assert at.agreement.sel(inverse="damped", rung="ggn").item() == pytest.approx(wanted, abs=1e-9)
    assert at.agreement.sel(inverse="damped", rung="hessian").item() == pytest.approx(1)
    assert at.gradient_norm.item() == pytest.approx(float(scores[2].norm()))


def test_the_lds_of_a_rung_is_that_of_its_scores_by_hand(study: Study, points: list[Point], measured, scores) -> None:
    asked = replace(study, evaluation=json.dumps({"alphas": [0.4], "subsets": 5, "seeds": 2}))
    job = decompose_lds.lds_job(asked, points[0], measured[0])
    assert job is not None
    retraining.create(job.truth)
    for piece in retraining.pieces(job.truth):
        retraining.retrain_piece(piece)
    retraining.finish(job.truth)
    decompose_lds.evaluate(job)
    found, truth = read_tensors(f"{job.url}/numbers.safetensors"), retraining.load_truth(job.truth.url)
    for rung in (0, 1):
        predicted = scores[rung].numpy() @ truth.masks[0].T
        wanted = [spearmanr(a, b).statistic for a, b in zip(predicted, truth.measurement[0].mean(1).T, strict=True)]
        assert found["rung_lds"][0, 1, rung].tolist() == pytest.approx(wanted)
    assert found["rung_lds_bound"].shape == (1, 2, 5, 2)
    assert (found["rung_lds_bound"][..., 0] <= found["rung_lds"].mean(-1)).all()
    assert found["rung_lds_step_bound"].shape == (1, 2, 4, 2)
    changes = found["rung_lds"].mean(-1).diff(dim=2)
    assert (found["rung_lds_step_bound"][..., 0] <= changes + 1e-12).all()
    assert (changes <= found["rung_lds_step_bound"][..., 1] + 1e-12).all()
    assert decompose_lds.lds_job(asked, replace(points[0], progress=0.5), measured[0]) is None


def test_the_interval_of_a_rungs_lds_holds_no_number_that_is_no_correlation() -> None:
    draws = np.random.default_rng(0).normal(0.9, 0.1, (2, 3, 500))
    bounds = decompose_lds._bounds(draws, np.full((2, 3), 0.95), within=1.0)
    assert bounds.shape == (2, 3, 2)
    assert (bounds[..., 1] == 1.0).all()
    assert (bounds[..., 0] < 0.95).all()


def test_refused_points_stay_in_the_results_as_nan(opened) -> None:
    assert dict(opened.results.sizes) | {"width": 3, "epochs": 2, "rung": 5, "inverse": 2} == dict(opened.results.sizes)
    assert np.isnan(opened.results.error.sel(width=40)).all()
    assert not np.isnan(opened.results.error.sel(width=[3, 4], reference="hessian")).any()
    assert int(opened.results.parameters.sel(width=40, epochs=1)) == 403


@pytest.mark.parametrize("swept", [{}, {"epochs": 1}, {"epochs": 1, "rung": "low"}], ids=len)
def test_swept_options_become_dimensions_however_many_they_are(study: Study, points: list[Point], measured, tmp_path: Path, swept) -> None:
    url = decompose_results.study_url(f"file://{tmp_path}", "s")
    one = [replace(points[0], swept=json.dumps(swept))]
    decompose_results.write_results(url, study, one, [(measured[0].url,)])
    decompose_results.complete(url, decompose_results.manifest(study, one, "s", "2026", {}) | {"timings": {}})
    found = tda.open_study(tmp_path).results
    assert {"epochs", "option_rung"} & set(found.dims) == {"epochs", "option_rung"} & {"option_rung" if k == "rung" else k for k in swept}
    assert "point" not in found.dims
    assert found.sizes["rung"] == 5


def test_measuring_again_does_nothing(study: Study, points: list[Point], measured: list[PointJob | None], monkeypatch) -> None:
    monkeypatch.setattr(decompose_measure, "load_ladder", None)
    assert measured[0] is not None
    assert decompose_measure.measure(measured[0])["seconds"] < 1


def test_another_inverse_is_another_artifact_of_the_same_spectra(
    study: Study, points: list[Point], measured: list[PointJob | None]
) -> None:
    other = decompose.job_of(replace(study, inverses=study.inverses[:1]), points[0])
    assert measured[0] is not None
    assert other.url != measured[0].url
    assert other.spectra == measured[0].spectra


@pytest.fixture
def way(study: Study) -> Point:
    """A point halfway, trained: checkpoints at the steps 0, 3, ..., 45 and 46 of 46."""
    half, end = decompose.examine(replace(study, sweep='{"width": [3]}', progress=(0.5, 1.0)))
    assert (half.named, end.named) == ({"width": 3, "progress": 0.5}, {"width": 3})
    assert half.training == end.training
    training.train(half.training)
    assert decompose.job_of(study, end).subject.checkpoint.endswith("/weights.safetensors")
    return half


def test_a_point_on_the_way_is_the_nearest_stored_checkpoint(study: Study, way: Point) -> None:
    moment = decompose.moment_of(way)
    assert (moment.step, moment.share) == (24, 24 / 46)
    assert moment.checkpoint.endswith("/steps/000000000024.safetensors")
    assert decompose.job_of(study, way).subject.checkpoint == moment.checkpoint
    assert decompose_results.described(way, trained=True)["step"] == 24


@pytest.mark.parametrize("progress", [0.01, 0.6, 0.9])
def test_a_share_of_the_training_without_a_checkpoint_near_it_is_refused(way: Point, progress: float, tmp_path: Path) -> None:
    thinned = with_trajectory(way, tmp_path, lambda saved: [saved[0], saved[6], saved[-1]])
    with pytest.raises(
        InputError, match=rf"progress = {progress}: no checkpoint was stored near it \(width 3, .*; ask for some of 0.391, 1, "
    ):
        decompose.moment_of(replace(thinned, progress=progress))
    assert decompose.moment_of(replace(thinned, progress=0.4)).step == 18


def with_trajectory(point: Point, folder: Path, change) -> Point:
    """The same training with other checkpoints stored."""
    request = replace(point.request, store=f"file://{folder}")
    moved = replace(point, request=request)
    old, new = (Path(each.training[2].removeprefix("file://")) for each in (point, moved))
    shutil.copytree(old, new)
    told = json.loads((new / "trajectory.json").read_text())
    told["saved"] = change(told["saved"])
    (new / "trajectory.json").write_text(json.dumps(told))
    return moved


def test_a_silent_fit_or_one_that_goes_on_after_its_last_report_is_told_so(way: Point, tmp_path: Path) -> None:
    moved = with_trajectory(way, tmp_path, list)
    told = Path(moved.training[2].removeprefix("file://")) / "trajectory.json"
    told.write_text(told.read_text().replace('"whole": true', '"whole": false'))
    with pytest.raises(InputError, match=r"progress = 0.5: the training went on after step 46, its last report: call on_checkpoint after"):
        decompose.moment_of(moved)
    told.unlink()
    with pytest.raises(
        InputError, match=r"progress = 0.5 needs checkpoints on the way, and fit of .* reported none .*; let it call on_check"
    ):
        decompose.moment_of(moved)


def test_the_page_names_points_claims_and_what_was_left_out(opened) -> None:
    html = page(opened).decode()
    assert html.count("<figure") > 10
    for text in (
        "width 40 · epochs 1 (403 parameters takes 7.03 MiB",
        "the Kronecker steps carry about 60% of the error",
        "width 3 · epochs 3",
    ):
        assert text in html
    assert "nan" not in html.replace("nanmean", "").lower().split("<main>")[1].replace("nano", "")


def test_claims_compare_points_that_differ_in_one_option_alone(opened) -> None:
    found = {claim.said: claim for claim in claims(opened.points, "pinv")}
    assert found["off-block mass of the GGN grows with depth"].holds is None
    falls = found["off-block mass of the GGN falls in training"]
    mass = opened.results.off_block_mass.sel(reference="ggn", width=[3, 4])
    assert falls.measured.startswith(f"in {int((mass.sel(epochs=3) < mass.sel(epochs=1)).sum())} of 2 comparisons")
