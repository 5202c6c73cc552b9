"""A fit is the same in any order, goes on after a kill, and may be computed by two runs at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks import factors
from tasks.factors import FactorJob
from tasks.subject import Subject
from tests.flows.runs import objects, write_config
from tests.tasks.jobs import fit


@pytest.fixture
def job(tmp_path: Path) -> FactorJob:
    write_config(tmp_path)
    subject = Subject(f"{tmp_path}/tiny.py:Tiny", "{}", "", ("*",), (), "auto")
    return FactorJob(f"file://{tmp_path}/fit", (subject,), "exact", 0, 23, 2, 8, "full")


def test_tasks_in_another_order_give_the_same_bytes(job: FactorJob) -> None:
    other = replace(job, url=f"{job.url}-backwards")
    fit(job)
    fit(other, order=-1)
    assert objects(job.url) == objects(other.url)


def test_a_fit_killed_while_its_arrays_were_created_goes_on(job: FactorJob, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = replace(job, url=f"{job.url}-undisturbed")
    fit(undisturbed)
    created, create = [], factors.schema.create_array

    def killed(*arguments: Any) -> Any:
        if len(created) == 4:
            raise KeyboardInterrupt
        created.append(arguments)
        return create(*arguments)

    monkeypatch.setattr(factors.schema, "create_array", killed)
    with pytest.raises(KeyboardInterrupt):
        factors.create_factors(job)
    monkeypatch.undo()
    fit(job)
    assert objects(job.url) == objects(undisturbed.url)


def test_the_tasks_of_a_complete_fit_do_nothing(job: FactorJob) -> None:
    fit(job)
    before = objects(job.url)
    assert "complete.json" in before
    fit(job)  # of a run that began before the other's was complete
    assert objects(job.url) == before


def test_only_who_completes_a_fit_first_sweeps_the_partial_sums(job: FactorJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors.storage, "create_once", lambda *_: False)
    with pytest.raises(AssertionError):
        fit(job)
    assert [name for name in objects(job.url) if name.startswith("partial/")]
    monkeypatch.undo()
    factors.finish_factors(job)
    assert not [name for name in objects(job.url) if name.startswith("partial/")]
