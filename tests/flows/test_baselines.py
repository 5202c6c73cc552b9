"""A run of baselines beside a method of curvature: fits, directions, direct scores, the manifest and the report."""

from pathlib import Path

import numpy as np
import pytest

from tasks.verify import check
from tda.results import Run
from tests.flows.runs import PROBLEM, attribute, write_config

BASELINES = """
problem = "tiny.py:Tiny"
shard_size = 6
query_block = 3
ensemble = 2
[[methods]]
name = "ekfac"
[[methods]]
name = "tracin"
checkpoints = 2
[[methods]]
name = "trak"
projection_dim = 16
[[methods]]
name = "datainf"
[[methods]]
name = "dtda"
subsets = 12
[[methods]]
name = "random"
[[methods]]
name = "representation"
"""
TRAINS_ON_SUBSETS = PROBLEM.replace("dataset.x[i], dataset.y[i]", "dataset[i]")


@pytest.fixture(scope="module")
def run(cluster: str, tmp_path_factory: pytest.TempPathFactory, prefect_api: None) -> Run:
    folder = tmp_path_factory.mktemp("baselines")
    config = write_config(folder / "config", BASELINES, TRAINS_ON_SUBSETS)
    return attribute(config, f"{folder}/store", cluster)[1]


def test_every_baseline_scores_every_pair(run: Run) -> None:
    assert run.methods == ["ekfac", "tracin", "trak", "datainf", "dtda", "random", "representation"]
    found = run.influence.to_numpy()
    assert found.shape == (7, 5, 23)
    assert np.isfinite(found).all()
    assert all(np.ptp(each) > 0 for each in found)
    own = np.isfinite(run.self_influence.to_numpy()).all(1)
    assert dict(zip(run.methods, own.tolist(), strict=True)) == {m: m in ("ekfac", "tracin", "trak") for m in run.methods}


def test_members_draw_their_own_projections_and_share_what_is_retrained(run: Run) -> None:
    members = [run.member(m).sel(method="dtda").to_numpy() for m in range(2)]
    assert np.array_equal(*members)
    prints = [member["projections"]["16"] for member in run.manifest["members"]]
    assert prints[0] != prints[1]


def test_the_manifest_states_what_was_drawn_reused_and_damped(run: Run) -> None:
    told = run.manifest
    assert set(told["damping"]) == {"ekfac", "trak", "datainf"}
    assert all(value > 0 for value in told["damping"]["datainf"].values())
    assert {"trak", "random", "dtda"} <= set(told["noise"])
    assert "random projection" in told["noise"]["trak"]
    assert set(told["layer_share"]) == {"ekfac", "tracin", "trak", "datainf"}
    assert told["units"]["random"] == "standard normal, no unit"
    assert {"projections (16, seed 0)", "projections (16, seed 1)", "retraining (0.5 12 1, seed 0)"} <= set(told["reused"])
    assert "retraining (0.5 12 1, seed 1)" not in told["reused"], "one for all members: nothing that an earlier run had"
    assert Path(f"{run.url}/report.html".removeprefix("file://")).exists()


def test_a_sound_run_is_verified_as_sound(run: Run) -> None:
    """Also what was retrained, which grows with every run that shares it: each block of it tells its own checksum."""
    found = check(run)
    assert [(each.folder, fault) for each in found for fault in each.faults] == []
    assert not any(each.note for each in found)
    assert "retrained" in {each.folder.split("/")[1] for each in found}
