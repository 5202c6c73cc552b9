"""Runs with the methods beyond EK-FAC: ensembles, solves, unrolled training; and what of them is refused in one line."""

import sys
from pathlib import Path

import numpy as np
import pytest

from flows import cli
from tda import InputError
from tda.results import NotStored, Run
from tests.flows.runs import attribute, write_config

ENSEMBLE = """
problem = "tiny.py:Tiny"
shard_size = 6
query_block = 3
ensemble = 3
[[methods]]
name = "graddot"
[[methods]]
name = "cg"
damping = 0.05
tolerance = 1e-8
[[methods]]
name = "source"
segments = 2
"""


@pytest.fixture(scope="module")
def ensemble(cluster: str, tmp_path_factory: pytest.TempPathFactory, prefect_api: None) -> Run:
    folder = tmp_path_factory.mktemp("ensemble")
    return attribute(write_config(folder / "config", ENSEMBLE), f"{folder}/store", cluster)[1]


def test_an_ensemble_is_the_mean_of_its_members_with_a_standard_error(ensemble: Run) -> None:
    members = np.stack([ensemble.member(m).to_numpy() for m in range(3)]).astype(np.float64)
    scale = np.abs(members).max((0, 2, 3), keepdims=True)[0]
    assert (np.abs(ensemble.influence.to_numpy() - members.mean(0)) / scale).max() < 1e-6
    assert (np.abs(ensemble.stderr.to_numpy() - members.std(0, ddof=1) / 3**0.5) / scale).max() < 1e-6
    assert np.abs(members[0] - members[1]).max() > 0
    assert [str(m) for m in ensemble.member(0)["method"].values] == ["graddot", "cg", "source"]
    assert ensemble.manifest["seeds"] == {"run": 0, "fisher (sampled, segment 0)": 0, "fisher (sampled, segment 1)": 0} | {
        f"member {m}": m for m in range(3)
    }
    with pytest.raises(InputError, match="has no member 3; it has 3"):
        ensemble.member(3)


def test_a_member_is_what_a_run_with_its_seed_alone_is(ensemble: Run, cluster: str, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config", ENSEMBLE)
    _, alone = attribute(config, f"{tmp_path}/store", cluster, "seed=1", "ensemble=1")
    assert np.array_equal(alone.influence, ensemble.member(1))
    with pytest.raises(InputError, match="it is no ensemble"):
        alone.member(0)
    with pytest.raises(NotStored, match="ensemble = 2 or more"):
        _ = alone.stderr


def test_solves_are_told_and_stored(ensemble: Run) -> None:
    told, solve = ensemble.manifest["solves"]["cg"], ensemble.solve("cg")
    assert solve["residual"].dims == ("step", "query")
    assert solve.sizes["query"] == 5
    assert np.nanmax(solve["residual"][-1]) <= 1e-8
    assert (told["unconverged"], told["tolerance"]) == (0, 1e-8)
    with pytest.raises(NotStored, match="has no solve of 'source'"):
        ensemble.solve("source")


def test_the_segments_of_an_unrolled_training_are_told(ensemble: Run) -> None:
    told = ensemble.manifest["segments"]["source"]
    assert [segment["steps"] for segment in told] == [[0, 12], [12, 23]]
    assert sum(segment["horizon"] for segment in told) == pytest.approx(2.3)


def test_what_needs_a_solve_for_each_example_has_no_self_influence(ensemble: Run) -> None:
    finite = np.isfinite(ensemble.self_influence.to_numpy())
    assert finite[0].all()
    assert not finite[1:].any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "ggn"\npinv = -1', "pinv must be"),
        ('name = "ggn"\ndamping = -1', "damping must be a finite number >= 0"),
        ('name = "hessian"\nnegative = "flip"', 'negative must be "drop", "abs" or "keep", got \'flip\''),
        ('name = "ggn"\nmemory_limit = "10kB"', 'name = "cg"'),
        ('name = "cg"\ntolerance = 0', "tolerance"),
        ('name = "cg"\npreconditioner = "kfac"', "preconditioner"),
        ('name = "sni"\nbatch_size = 0', 'batch_size must be "full" or a whole number of at least 1, got 0'),
        ('name = "astra"\nschedule = "papre"', "schedule"),
        ('name = "source"\nsegments = [5, 2]', "segments"),
        ('name = "source"\ndamping = "heuristic"', "leave it out to take the training's weight decay"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_done(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str], prefect_api: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words in _refused(tmp_path, text, capsys, monkeypatch)
    assert not (tmp_path / "store").exists()


def test_a_step_that_diverges_is_named_with_one_that_would_do(
    tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str], prefect_api: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = _refused(tmp_path, 'name = "sni"\ndamping = 0.01\nstep_size = 1e3', capsys, monkeypatch, "--set", cluster)
    assert "step_size" in said
    assert "step_size = 1e+03 is too large" in said


def test_source_without_checkpoints_says_how_to_give_them(
    ensemble: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prefect_api: None
) -> None:
    store = Path(ensemble.store.removeprefix("file://"))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(next(store.glob("artifacts/checkpoint/*/weights.safetensors")).read_bytes())
    said = _refused(tmp_path, 'name = "source"', capsys, monkeypatch, "--set", f"checkpoint={weights}")
    assert "source needs the training's checkpoints" in said
    assert "on_checkpoint" in said


def _refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *more: str) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = write_config(tmp_path / "config", f'problem = "tiny.py:Tiny"\n[[methods]]\n{text}\n')
    status = cli.status(["run", str(file), "--store", f"{tmp_path}/store", *more])
    said = capsys.readouterr().err
    assert status == cli.BAD_INPUT, said
    assert said.strip().splitlines()[-1].startswith("tda: ")
    return said
