"""A fit is the same in any order, goes on after a kill, may be computed by two runs at once, and may pool several checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tda
from tasks import factors, plan
from tasks.factors import FactorJob
from tasks.subject import Subject, open_subject
from tda import checkpoint
from tda.curvature.covariances import covariance_sums
from tda.curvature.eigen import Factor, eigenvalue_sums
from tda.problem import load_problem
from tda.stored_factors import load_factors
from tests.flows.runs import objects, write_config
from tests.tasks.jobs import fit, planned


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


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_summed_few_at_a_time_give_the_same_bytes_and_hold_their_own_sums_alone(
    job: FactorJob, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(job, url=f"{job.url}-few", layer_block=layers)
    fit(job)
    written, write = [], factors.write_tensors
    monkeypatch.setattr(factors, "write_tensors", lambda url, tensors: (written.append(set(tensors)), write(url, tensors)))
    fit(few)
    assert objects(few.url) == objects(job.url)
    assert {len({name.split("/")[0] for name in names}) for names in written} == {layers, 3 % layers or layers}
    assert set.union(*({name.split("/")[0] for name in names} for names in written)) == {"0", "1", "2"}


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


def matrices(factor: Factor, group: int = 0) -> list[torch.Tensor]:
    """S and A of a factor, written out."""
    found = []
    for basis, values in ((factor.basis_out, factor.kfac_out), (factor.basis_in, factor.kfac_in)):
        U = torch.eye(values.shape[1], dtype=values.dtype) if basis is None else basis[group]
        found.append(U @ torch.diag(values[group]) @ U.T)
    return found


@pytest.mark.parametrize("shard_size", [2, 40])
def test_pooled_checkpoints_are_means_over_examples_and_checkpoints(job: FactorJob, shard_size: int, tmp_path: Path) -> None:
    subjects = []
    for k in range(3):
        model, generator = load_problem(job.subject.problem).model(), torch.Generator().manual_seed(k)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.5)
        (tmp_path / f"{k}.safetensors").write_bytes(checkpoint.dump(model))
        subjects.append(replace(job.subject, checkpoint=f"file://{tmp_path}/{k}.safetensors"))
    pool = replace(job, subjects=tuple(subjects), shard_size=shard_size)
    assert pool.parts == 3 * pool.shards
    fit(pool)
    opened = [open_subject(subject) for subject in subjects]
    blocks = opened[0].attributed.blocks
    found = load_factors(pool.url, blocks)
    options: dict[str, Any] = {"fisher": "exact", "seed": 0, "batch_size": 8}
    sums = [covariance_sums(each.attributed, each.train, range(23), **options) for each in opened]
    squares = [eigenvalue_sums(each.attributed, found, each.train, range(23), **options) for each in opened]
    for b, factor in enumerate(found):
        out, in_ = (sum(getattr(one[b], side) for one in sums) / (3 * 23) for side in ("out", "in_"))
        S, A = matrices(factor)
        assert torch.allclose(S, out[0], rtol=0, atol=1e-12 * float(S.abs().max()))
        assert torch.allclose(A, in_[0] if in_.ndim == 3 else torch.diag(in_[0]), rtol=0, atol=1e-12 * float(A.abs().max()))
        assert factor.eigenvalues is not None
        assert torch.allclose(factor.eigenvalues, sum(one[b] for one in squares) / (3 * 23), rtol=1e-12)


def test_a_checkpoint_pooled_with_itself_is_itself(job: FactorJob) -> None:
    twice = replace(job, url=f"{job.url}-twice", subjects=(job.subject, job.subject))
    fit(job)
    fit(twice)
    blocks = open_subject(job.subject).attributed.blocks
    for one, other in zip(load_factors(job.url, blocks), load_factors(twice.url, blocks), strict=True):
        assert one.eigenvalues is not None
        assert other.eigenvalues is not None
        assert torch.allclose(one.eigenvalues, other.eigenvalues, rtol=1e-9)
        assert torch.allclose(one.kronecker, other.kronecker, rtol=1e-9, atol=1e-12 * float(one.kronecker.max()))


def test_sampled_factors_of_a_mean_are_no_others_that_a_store_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients at drawn labels were once of the mean itself; nothing else of the fit tells these factors apart."""
    before = planned(tmp_path / "config", f"{tmp_path}/store")
    problem = open_subject(before.first.subject).attributed.problem
    for reduction, same in (("sum", [True, True]), ("mean", [False, True])):
        monkeypatch.setattr(problem, "likelihood", tda.TokenCategorical(reduction=reduction), raising=False)
        fits = plan.plan(before.request, before.inputs).first.fits
        assert [(fits[key].url == job.url) for key, job in before.first.fits.items()] == same
        assert [getattr(job, "fisher", "") for job in before.first.fits.values()] == ["sampled", "exact"]
