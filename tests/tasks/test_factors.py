"""A fit may be computed by two runs at once: whoever comes after its completion changes nothing."""

from pathlib import Path

import pytest

from tasks import factors
from tasks.factors import FactorJob, Node
from tasks.subject import Subject
from tests.flows.runs import objects, write_config


@pytest.fixture
def job(tmp_path: Path) -> FactorJob:
    write_config(tmp_path)
    subject = Subject(f"{tmp_path}/tiny.py:Tiny", "{}", "", ("*",), (), "auto")
    return FactorJob(f"file://{tmp_path}/fit", subject, "exact", 0, 23, 2, 8, "full")


def fit(job: FactorJob) -> None:
    factors.create_factors(job)
    for sums in ("covariance", "eigenvalues"):
        for shard in range(job.shards):
            factors.sum_shard(Node(job, sums, 0, shard))
        for level in factors.levels(job, sums):
            for node in level:
                factors.reduce_node(node)
        if sums == "covariance":
            for layer in range(3):
                factors.decompose_layer((job, layer))


def test_the_tasks_of_a_complete_fit_do_nothing(job: FactorJob) -> None:
    fit(job)
    factors.finish_factors(job)
    before = objects(job.url)
    assert "complete.json" in before
    fit(job)  # of a run that began before the other's was complete
    factors.finish_factors(job)
    assert objects(job.url) == before


def test_only_who_completes_a_fit_first_sweeps_the_partial_sums(job: FactorJob, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(job)
    partial = [name for name in objects(job.url) if name.startswith("partial/")]
    monkeypatch.setattr(factors.storage, "create_once", lambda *_: False)
    factors.finish_factors(job)
    assert [name for name in objects(job.url) if name.startswith("partial/")] == partial
    monkeypatch.undo()
    factors.finish_factors(job)
    assert not [name for name in objects(job.url) if name.startswith("partial/")]
