"""The means of an ensemble are verified like every other array."""

from itertools import product
from pathlib import Path

import pytest

from tasks import directions, ensemble, scores
from tasks import plan as plans
from tests.tasks.jobs import fit, planned

TEXT = """
problem = "tiny.py:Tiny"
shard_size = 12
ensemble = 2
[[methods]]
name = "ekfac"
damping = 0.1
"""


@pytest.fixture
def job(tmp_path: Path) -> ensemble.MeanJob:
    plan = planned(tmp_path / "config", f"{tmp_path}/store", text=TEXT).placed(f"file://{tmp_path}/run")
    for member in plan.members:
        for each in member.fits.values():
            fit(each)
        for scored in member.scores.methods:
            directions.make_directions((scored.directions, 0))
        scores.create_results(member.scores, {}, plans.results_attrs(plan, "RUN"))
        for shard, block in product(*map(range, member.scores.shape)):
            scores.score_shard((member.scores, shard, block))
    found = ensemble.MeanJob(f"file://{tmp_path}/run/results.zarr", tuple(member.scores for member in plan.members))
    ensemble.create_means(found, {}, plans.results_attrs(plan, "RUN"))
    for shard in range(2):
        ensemble.average_shard((found, shard))
    return found


@pytest.mark.parametrize("array", ["influence", "stderr", "self_influence", "train_loss"])
def test_a_lost_chunk_of_a_mean_is_found_and_named(job: ensemble.MeanJob, array: str) -> None:
    for shard in range(2):
        ensemble.verify_mean((job, shard))
    chunks = Path(job.results.removeprefix("file://"), array, "c")
    max(chunks.rglob("*"), key=lambda path: (path.is_file(), str(path))).unlink()
    with pytest.raises(ArithmeticError, match=array):
        _ = [ensemble.verify_mean((job, shard)) for shard in range(2)]
