"""Candidates alone: the full scan's numbers, only they pass through the model, whole chunks in any order, and what is missing is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.attribute import examine, request_of
from flows.config import load_config
from tasks import candidates, directions, scores, sparse, training
from tasks import plan as plans
from tasks.publish import layer_share
from tasks.subject import open_subject
from tda import checkpoint, location
from tda.errors import InputError
from tda.problem import load_problem
from tda.results import Run
from tests.flows.runs import PROBLEM, objects, write_config
from tests.tasks.jobs import fit

SPOKEN = (
    PROBLEM
    + """
class Spoken(Tiny):
    def text(self, split, i):
        return f"a{i % 3} b{i % 5} c{i % 7}"
"""
)
CONFIG = """
problem = "tiny.py:Spoken"
shard_size = 4
query_block = 3
[candidates]
bm25 = 4
random = 2
[[methods]]
name = "gradcos"
[[methods]]
name = "ekfac"
fisher = "exact"
damping = 0.01
"""


@pytest.fixture
def plan(tmp_path: Path) -> plans.Plan:
    return planned(tmp_path)


def planned(tmp_path: Path, *overrides: str) -> plans.Plan:
    """A plan of which only the scores are to be made."""
    request = request_of(load_config(write_config(tmp_path / "config", CONFIG, SPOKEN), overrides, f"{tmp_path}/store"))
    inputs = examine(request)
    training.train((request.subject, request.seed, plans.training_artifact(request, inputs, request.seed)))
    decided = plans.plan(request, inputs)
    candidates.select(decided.candidates)
    for each in decided.first.fits.values():
        fit(each)
    for scored in decided.first.scores.methods:
        for block in range(decided.first.scores.shape[1]):
            directions.make_directions((scored.directions, block))
    return decided


def created(plan: plans.Plan, name: str) -> scores.ScoreJob:
    url = f"{plan.request.store}/runs/{name}"
    job = replace(plan.first.scores, results=f"{url}/results.zarr", receipts=f"{url}/receipts")
    labels = {"train": plan.inputs.train_labels, "query": plan.inputs.query_labels}
    sparse.create_results(job, labels, plans.results_attrs(plan, "RUN"))
    return job


def run(job: scores.ScoreJob, order: int = 1) -> None:
    for piece in sparse.pieces(job)[::order]:
        sparse.score_piece(piece)
    for block in list(range(job.shape[1]))[::order]:
        sparse.gather((job, block))


def ids_of(job: scores.ScoreJob) -> np.ndarray:
    return location.open_group(job.results)["candidate_id"][...]


def test_scores_of_some_examples_are_those_of_the_scan_in_float64(plan: plans.Plan) -> None:
    job = plan.first.scores
    for block in range(job.shape[1]):
        full = scores.scored(job, range(23), block)[0]
        some = [1, 4, 5, 17, 22]
        found = scores.scored(job, some, block)[0]
        assert str(found.influence.dtype) == "torch.float64"
        np.testing.assert_allclose(found.influence, full.influence[:, :, some], rtol=1e-12)
        np.testing.assert_allclose(found.loss, full.loss[some], rtol=1e-12)


def test_what_is_stored_is_each_querys_candidates(plan: plans.Plan) -> None:
    job = created(plan, "first")
    run(job)
    group, ids = location.open_group(job.results), ids_of(job)
    for block in range(job.shape[1]):
        full = scores.scored(job, range(23), block)[0]
        for q in job.query_ids(block):
            real = ids[q] >= 0
            wanted = full.influence[:, q - job.query_ids(block).start, ids[q][real]].numpy()
            np.testing.assert_allclose(group["candidate_influence"][:, q][:, real], wanted, rtol=1e-6)
            assert np.isnan(group["candidate_influence"][:, q][:, ~real]).all()
            np.testing.assert_allclose(group["candidate_loss"][q][real], full.loss[ids[q][real]], rtol=1e-6)
        sparse.verify_block((job, block))


def test_a_methods_label_selects_in_candidates_as_in_a_full_scan(plan: plans.Plan) -> None:
    job = created(plan, "first")
    run(job)
    folder = job.results.rpartition("/")[0]
    found = Run(folder, {"config": {"candidates": {"on": "train"}}, "shape": {"train": 23}}).candidates
    row = found["influence"].loc["ekfac", 2].to_numpy()
    for same in (found["influence"].sel(method="ekfac", query=2), found.sel(method="ekfac").influence.sel(query=2)):
        np.testing.assert_array_equal(same.to_numpy(), row)
    assert set(found["influence"].coords) >= {"method", "query", "candidate_id", "candidate_source", "candidate_label", "query_label"}
    assert found.sel(query=[2], method="ekfac").sizes["query"] == 1
    assert found.attrs["examples"] == found["influence"].attrs["examples"] == 23
    for data in (found, found["influence"], found.sel(method="gradcos")):
        with pytest.raises(InputError, match="no method 'kfac' here; there is gradcos"):
            data.sel(method="kfac")


def test_only_the_candidates_of_a_block_pass_through_the_model(plan: plans.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    job, seen = created(plan, "first"), dict[int, list[int]]()
    real = scores.score

    def score(attributed, scorers, dataset, ids, **options):
        seen[block] += ids
        return real(attributed, scorers, dataset, ids, **options)

    monkeypatch.setattr(scores, "score", score)
    ids = ids_of(job)
    for each in sparse.pieces(job):
        block = each[2]
        seen.setdefault(block, [])
        sparse.score_piece(each)
    for block, asked in seen.items():
        wanted = np.unique(ids[job.query_ids(block).start : job.query_ids(block).stop])
        assert asked == wanted[wanted >= 0].tolist(), "each once"
        assert len(asked) < 23


def test_pieces_in_another_order_give_the_same_bytes(plan: plans.Plan) -> None:
    first, other = created(plan, "first"), created(plan, "backwards")
    run(first)
    run(other, order=-1)
    assert objects(first.results) == objects(other.results)


def test_what_has_a_receipt_is_not_computed_again(plan: plans.Plan) -> None:
    job = created(plan, "first")
    run(job)
    before = objects(job.results)
    assert {sparse.score_piece(each)["seconds"] for each in sparse.pieces(job)} == {0.0}
    sparse.gather((job, 0))
    assert objects(job.results) == before
    assert not [name for name in objects(job.receipts) if name.endswith(".safetensors")]


def test_layers_share_what_was_asked_for_however_the_queries_are_cut(tmp_path: Path) -> None:
    shares = []
    for block in (1, 3, 5):  # alone, a query's pieces hold its own candidates and no others
        plan = planned(tmp_path, f"query_block={block}")
        job = created(plan, f"by-{block}")
        receipts = [sparse.score_piece(piece) for piece in sparse.pieces(job)]
        shares.append(layer_share(replace(plan.first, scores=job), receipts)["ekfac"])
    assert len(set(shares[0].values())) > 1
    for other in shares[1:]:
        assert other == pytest.approx(shares[0], rel=1e-9)


def test_self_influence_is_not_there_for_candidates_and_asking_makes_no_other_run(tmp_path: Path) -> None:
    file, weights = write_config(tmp_path / "config", CONFIG, SPOKEN), tmp_path / "weights.safetensors"
    weights.write_bytes(checkpoint.dump(load_problem(f"{tmp_path}/config/tiny.py:Spoken").model()))

    def print_of(*overrides: str) -> str:
        request = request_of(load_config(file, [f'checkpoint="{weights}"', *overrides], f"{tmp_path}/store"))
        return plans.plan(request, examine(request)).fingerprint

    assert print_of("self_influence=false") == print_of()
    text = file.read_text()
    file.write_text(text[: text.index("[candidates]")] + text[text.index("[[methods]]") :])
    assert print_of("self_influence=false") != print_of()


def test_on_s3_the_bytes_are_those_of_a_folder(plan: plans.Plan, moto_s3: str) -> None:
    folder = created(plan, "first")
    run(folder)
    url = f"{moto_s3}/store/artifacts/candidates/f"
    candidates.select(replace(plan.candidates, url=url))
    chosen = replace(plan.first, scores=replace(plan.first.scores, candidates=url))
    job = created(replace(plan, members=(chosen,), request=replace(plan.request, store=f"{moto_s3}/store")), "first")
    run(job)
    for block in range(job.shape[1]):
        sparse.verify_block((job, block))
    assert objects(job.results) == objects(folder.results)
    assert objects(f"{url}/candidates.zarr") == objects(plan.candidates.zarr)


@pytest.mark.parametrize("array", ["candidate_influence", "candidate_loss", "query_measurement"])
def test_a_missing_chunk_is_found_and_computed_again(plan: plans.Plan, array: str) -> None:
    job = created(plan, "first")
    run(job)
    whole = objects(job.results)
    chunk = next(path for path in sorted(Path(job.results.removeprefix("file://"), array, "c").rglob("*")) if path.is_file())
    chunk.unlink()
    with pytest.raises(ArithmeticError, match=rf"{array}, queries 0\.\.2: .*the next try computes it again"):
        sparse.verify_block((job, 0))
    run(job)
    sparse.verify_block((job, 0))
    assert objects(job.results) == whole


def test_candidates_are_an_artifact_of_the_data_and_the_options(tmp_path: Path) -> None:
    file, weights = write_config(tmp_path / "config", CONFIG, SPOKEN), tmp_path / "weights.safetensors"
    weights.write_bytes(checkpoint.dump(load_problem(f"{tmp_path}/config/tiny.py:Spoken").model()))

    def url(*overrides: str) -> str:
        request = request_of(load_config(file, [f'checkpoint="{weights}"', *overrides], f"{tmp_path}/store"))
        return plans.plan(request, examine(request)).candidates.url

    first = url()
    assert url('methods=[{name="graddot"}]', "query_block=2") == first
    others = {url("candidates.bm25=3"), url("seed=1"), url("problem_options.seed=2"), url("problem_options.queries=4")}
    assert len(others | {first}) == 5
    assert url("candidates.random=0", "seed=1") == url("candidates.random=0"), "without random ones the seed draws nothing"


def test_a_problem_is_opened_without_its_model(plan: plans.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    open_subject(plan.first.subject)
    job = plan.candidates
    monkeypatch.setattr("tasks.subject.inspect", None)
    candidates.select(replace(job, url=job.url + "2", corpus=replace(job.corpus, checkpoint="nowhere")))
    again = location.open_group(job.url + "2/candidates.zarr")["candidate_id"][...]
    assert np.array_equal(again, location.open_group(job.zarr)["candidate_id"][...])
