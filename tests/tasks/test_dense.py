"""A curvature matrix and its spectra are the same in any order, go on after a kill, and are made again where they are damaged."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import dense, layout
from tasks.dense import DenseJob
from tasks.subject import Subject, open_subject
from tda.errors import InputError
from tda.solvers.operator import Curvature, Operator
from tests.flows.runs import objects, write_config

SIZES = [35, 10, 18]
CURVATURES = ["hessian", "ggn", "block_ggn"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tasks for each diagonal block, several chunks for each array."""
    monkeypatch.setattr(dense, "ROWS", 16)
    monkeypatch.setattr(dense, "CHUNK", 32)
    yield
    dense._operator.cache_clear()


@pytest.fixture
def job(tmp_path: Path) -> DenseJob:
    return job_of(tmp_path, "ggn")


def job_of(folder: Path, curvature: Curvature, **options: Any) -> DenseJob:
    write_config(folder)
    subject = Subject(f"{folder}/tiny.py:Tiny", json.dumps({"dtype": "float32", **options}), "", ("*",), (), "float64")
    return DenseJob(f"file://{folder}/{curvature}", subject, curvature, 23, 8)


def compute(job: DenseJob, order: int = 1) -> None:
    dense.create(job)
    for task in dense.row_tasks(job)[::order]:
        dense.rows(task)
    for task in dense.decompose_tasks(job)[::order]:
        dense.decompose(task)
    dense.finish(job)
    assert layout.is_complete(job.url)


def path(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def chunks(job: DenseJob, name: str = "eigenvectors") -> list[Path]:
    return sorted(file for file in path(job.zarr).rglob("*") if file.is_file() and f"/{name}/c/" in str(file))


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_spectra_are_those_of_the_matrix(tmp_path: Path, curvature: Curvature) -> None:
    job = job_of(tmp_path, curvature)
    compute(job)
    opened = open_subject(job.subject)
    matrix = Operator(opened.attributed, opened.train, curvature, 23).rows(0, sum(SIZES))
    found = dense.load_spectra(job.url)
    assert [s.blocks for s in found] == ([(0,), (1,), (2,)] if curvature == "block_ggn" else [(0, 1, 2)])
    again = torch.block_diag(*((s.vectors * s.values) @ s.vectors.T for s in found))
    torch.testing.assert_close(again, matrix, rtol=0, atol=1e-14)
    assert again.dtype == torch.float64


@pytest.mark.parametrize("curvature", CURVATURES)
def test_tasks_in_another_order_give_the_same_bytes(tmp_path: Path, curvature: Curvature) -> None:
    job = job_of(tmp_path, curvature)
    other = replace(job, url=f"{job.url}-backwards")
    compute(job)
    compute(other, order=-1)
    assert objects(job.url) == objects(other.url)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 70), size=st.integers(1, 70))
def test_every_row_is_the_work_of_one_task(tmp_path_factory: pytest.TempPathFactory, rows: int, size: int) -> None:
    job = DenseJob(f"file://{tmp_path_factory.mktemp('rows')}", None, "block_ggn", 1, 1)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "ROWS", rows)
        patch.setattr(dense, "_sizes", lambda _: [size, 3])
        found = dense.row_tasks(job)
    assert [task.offset + row for task in found for row in range(task.start, task.stop)] == list(range(size + 3))


@pytest.mark.parametrize("stage", ["create", "rows", "decompose", "finish"])
def test_what_is_killed_goes_on_where_it_was(job: DenseJob, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    undisturbed = replace(job, url=f"{job.url}-undisturbed")
    compute(undisturbed)
    module, name, after = {
        "create": (dense.layout, "ensure_array", 1),
        "rows": (dense, "write_tensors", 3),
        "decompose": (dense.storage, "write_json", 1),  # after the arrays, before the receipt
        "finish": (dense.storage, "create_once", 0),
    }[stage]
    calls, real = [], getattr(module, name)

    def killed(*arguments: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        compute(job)
    monkeypatch.undo()
    monkeypatch.setattr(dense, "ROWS", 16)
    monkeypatch.setattr(dense, "CHUNK", 32)
    written = []
    monkeypatch.setattr(dense, "write_tensors", lambda *arguments: written.append(write(*arguments)))
    compute(job)
    assert objects(job.url) == objects(undisturbed.url)
    assert len(written) == {"create": 4, "rows": 1, "decompose": 0, "finish": 0}[stage]


write = dense.write_tensors


def test_the_tasks_of_complete_spectra_do_nothing(job: DenseJob) -> None:
    dense.create(job)
    late = dense.row_tasks(job), dense.decompose_tasks(job)
    compute(job)
    before = objects(job.url)
    assert not [name for name in before if name.startswith("partial/")]
    for rows in late[0]:
        dense.rows(rows)
    for each in late[1]:
        dense.decompose(each)
    compute(job)
    assert dense.row_tasks(job) == []
    assert dense.decompose_tasks(job) == []
    assert objects(job.url) == before


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"no tensors at all", None])
def test_rows_that_are_lost_or_damaged_are_computed_again(job: DenseJob, damage: bytes | None) -> None:
    undisturbed = replace(job, url=f"{job.url}-undisturbed")
    compute(undisturbed)
    dense.create(job)
    tasks = dense.row_tasks(job)
    for task in tasks:
        dense.rows(task)
    path(tasks[2].url).unlink()
    if damage is not None:
        path(tasks[2].url).write_bytes(damage)
    for each in dense.decompose_tasks(job):
        dense.decompose(each)
    dense.finish(job)
    assert objects(job.url) == objects(undisturbed.url)


@pytest.mark.parametrize("name", ["spectrum", "eigenvectors"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_spectrum_damaged_before_it_is_complete_is_made_again(job: DenseJob, name: str, lost: bool) -> None:
    undisturbed = replace(job, url=f"{job.url}-undisturbed")
    compute(undisturbed)
    dense.create(job)
    for rows in dense.row_tasks(job):
        dense.rows(rows)
    for each in dense.decompose_tasks(job):
        dense.decompose(each)
    damage(chunks(job, name)[-1], lost)
    dense.finish(job)
    assert objects(job.url) == objects(undisturbed.url)


@pytest.mark.parametrize("lost", [True, False])
def test_spectra_damaged_later_are_named_in_one_line(job: DenseJob, lost: bool) -> None:
    compute(job)
    damage(chunks(job)[0], lost)
    with pytest.raises(InputError, match=r"eigenvectors of diagonal block 0 .*; delete that folder and start the run again") as told:
        dense.load_spectra(job.url)
    assert job.url in str(told.value)
    assert "\n" not in str(told.value)


def damage(file: Path, lost: bool) -> None:
    if lost:
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(bytes(data))


def test_an_example_whose_loss_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, "hessian")
    dense.create(job)
    data = open_subject(job.subject).train
    monkeypatch.setattr(data, "x", data.x.clone())
    data.x[17] = torch.nan
    with pytest.raises(InputError, match="the loss of train example 17 is nan"):
        dense.rows(dense.row_tasks(job)[0])
    assert not [name for name in objects(job.url) if name.endswith(".safetensors")]


def test_a_likelihood_that_is_not_convex_is_refused(job: DenseJob, monkeypatch: pytest.MonkeyPatch) -> None:
    dense.create(job)
    likelihood = type(open_subject(job.subject).attributed.problem.likelihood)
    product = likelihood.hessian_product
    monkeypatch.setattr(likelihood, "hessian_product", lambda *arguments: -product(*arguments))
    for task in dense.row_tasks(job):
        dense.rows(task)
    with pytest.raises(InputError, match=r"the ggn has the eigenvalue -\d.* is of no convex loss"):
        dense.decompose(dense.decompose_tasks(job)[0])
