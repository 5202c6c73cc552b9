"""Score shards are whole chunks in any order, are done once, and what is missing is found before a run counts as complete."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tasks import directions, scores
from tasks import plan as plans
from tda import location
from tests.flows.runs import objects
from tests.tasks.jobs import fit, planned


@pytest.fixture
def job(tmp_path: Path) -> scores.ScoreJob:
    plan = planned(tmp_path / "config", f"{tmp_path}/store")
    for each in plan.first.fits.values():
        fit(each)
    for scored in plan.first.scores.methods:
        for block in range(plan.first.scores.shape[1]):
            directions.make_directions((scored.directions, block))
    return created(plan, "first")


def created(plan: plans.Plan, name: str) -> scores.ScoreJob:
    url = f"{plan.request.store}/runs/{name}"
    job = replace(plan.first.scores, results=f"{url}/results.zarr", receipts=f"{url}/receipts")
    scores.create_results(job, {"train": plan.inputs.train_labels, "query": plan.inputs.query_labels}, plans.results_attrs(plan, "RUN"))
    return job


def run(job: scores.ScoreJob, order: int = 1) -> list[dict]:
    shards, blocks = job.shape
    return [scores.score_shard((job, shard, block)) for shard, block in list(product(range(shards), range(blocks)))[::order]]


def test_shards_in_another_order_give_the_same_bytes(job: scores.ScoreJob, tmp_path: Path) -> None:
    other = created(planned(tmp_path / "config", f"{tmp_path}/store"), "backwards")
    run(job)
    run(other, order=-1)
    assert objects(job.results) == objects(other.results)


def test_a_shard_with_a_receipt_is_not_computed_again(job: scores.ScoreJob) -> None:
    first = run(job)
    before = objects(job.results)
    again = run(job)
    assert [receipt["mass"] for receipt in again] == [receipt["mass"] for receipt in first]
    assert {receipt["seconds"] for receipt in again} == {0.0}
    assert objects(job.results) == before


def test_arrays_are_created_once_and_never_wiped(job: scores.ScoreJob, tmp_path: Path) -> None:
    scores.score_shard((job, 0, 0))
    before = objects(job.results)
    Path(job.receipts.removeprefix("file://"), "created.json").unlink()
    created(planned(tmp_path / "config", f"{tmp_path}/store"), "first")
    assert objects(job.results) == before


@pytest.mark.parametrize("array", ["influence", "train_loss", "self_influence", "query_measurement"])
def test_a_missing_chunk_is_found_and_named(job: scores.ScoreJob, array: str) -> None:
    run(job)
    for shard in range(job.shape[0]):
        scores.verify_shard((job, shard))
    chunk = max(Path(job.results.removeprefix("file://"), array, "c").rglob("0"), key=lambda path: len(path.parts) * path.is_file())
    chunk.unlink()
    with pytest.raises(ArithmeticError, match=array):
        scores.verify_shard((job, 0))


def test_each_shard_writes_whole_chunks_of_its_own(job: scores.ScoreJob) -> None:
    scores.score_shard((job, 3, 1))
    assert {name for name in objects(f"{job.results}/influence") if name.startswith("c/")} == {f"c/{m}/1/3" for m in range(3)}
    group = location.open_group(job.results)
    found = np.isfinite(group["influence"][...])
    assert found.sum() == 3 * 2 * 2
    assert found[:, 3:5, 6:8].all()
