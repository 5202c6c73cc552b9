"""Chunks that were lost are computed again by the same command; runs at the same time keep out of each other's way."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tda
from flows import attribute as flow
from flows.attribute import RunFailed, request_of
from flows.config import load_config
from tasks import plan as plans
from tasks import prepare
from tests.flows.runs import attribute, digests, manifests, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def complete(config: Path, cluster: str) -> Path:
    """The store of a run, which is copied by whoever damages it."""
    attribute(config, f"{config.parent}/store", cluster)
    return config.parent / "store"


@pytest.fixture
def store(complete: Path, tmp_path: Path) -> Path:
    return shutil.copytree(complete, tmp_path / "store")


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-3])], ids=["gone", "cut short"])
@pytest.mark.parametrize("name", ["influence/c/1/1/4", "query_measurement/c/1", "train_loss/c/3"])
def test_a_chunk_that_was_lost_is_told_and_computed_again_by_the_same_command(
    config: Path, cluster: str, store: Path, name: str, damage: Callable[[Path], object]
) -> None:
    run = tda.open_run(store)
    before, folder = digests(run), Path(run.url.removeprefix("file://"))
    damage(folder / "results.zarr" / name)
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(RunFailed, match=f"{name.partition('/')[0]}.*the next try computes it again.*resumes it"):
        attribute(config, str(store), cluster)
    _, again = attribute(config, str(store), cluster)
    assert again.id == run.id
    assert digests(again) == before


def test_of_starts_at_the_same_time_each_has_its_own_id(config: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(load_config(config, (), str(store)))
    plan = plans.plan(request, prepare.examine(request))
    monkeypatch.setattr(flow.location, "list_names", lambda _: [])  # as both see it before either has written
    with ThreadPoolExecutor(4) as pool:
        ids = [found[0] for found in pool.map(lambda _: flow._claim(plan, {}), range(8))]
    assert len(set(ids)) == 8
    assert set(ids) < set(manifests(store))
