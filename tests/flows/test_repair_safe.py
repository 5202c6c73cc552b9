"""A repair loses nothing that is intact: what cannot be made again as it was is put back, and what belongs to nothing is left alone."""

from pathlib import Path

import pytest

import tda
from flows import repair
from flows.cli import status
from tasks import aside
from tests.flows.runs import PROBLEM, attribute, objects, write_config

CONFIG = """
problem = "tiny.py:Tiny"
shard_size = 8
methods = [{name = "graddot"}]
cluster = {workers = 1}
"""


def kept(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in objects(str(store)).items() if not name.endswith(("begun.json", "seconds.json"))}


def trained_at_a_rate(folder: Path, single: str) -> tuple[Path, Path]:
    """A file that holds the learning rate of a problem's fit, which no digest covers, and the store of a run with 0.1."""
    rate, store = folder / "rate", folder / "store"
    rate.write_text("0.1")
    unseeded = PROBLEM.replace(
        "torch.optim.SGD(model.parameters(), 0.1)", f"torch.optim.SGD(model.parameters(), float(Path('{rate}').read_text()))"
    )
    attribute(write_config(folder / "config", CONFIG, unseeded), str(store), single)
    return rate, store


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_weights_that_training_does_not_give_again_are_put_back_and_the_message_says_how_to_go_on(
    single: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate, store = trained_at_a_rate(tmp_path, single)
    before = kept(store)
    (marker,) = store.glob("artifacts/checkpoint/*/complete.json")
    for name in ("notes.txt", "steps/mine.safetensors"):
        (marker.parent / name).write_text("mine")
    assert status(["verify", "--store", str(store)]) == 0
    assert "  2 that belong to nothing, and are left alone: notes.txt, steps/mine.safetensors\n" in capsys.readouterr().out
    for name in ("notes.txt", "steps/mine.safetensors"):
        (marker.parent / name).unlink()

    marker.write_bytes(marker.read_bytes()[:-9])
    damaged = kept(store)
    rate.write_text("0.2")
    assert status(["verify", "--repair", "--store", str(store)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    folder = f"artifacts/checkpoint/{marker.parent.name}"
    assert f"{folder} was trained again, and is not what it was" in said
    assert f'checkpoint = "file://{store}/{folder}/weights.safetensors" goes on with them' in said
    assert kept(store) == damaged

    rate.write_text("0.1")
    assert status(["verify", "--repair", "--store", str(store)]) == 0
    assert kept(store) == before


def test_a_repair_killed_while_it_trains_calls_no_damaged_weights_intact_and_one_killed_at_its_end_is_not_done(
    single: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rate, store = trained_at_a_rate(tmp_path, single)
    before, run = kept(store), tda.open_run(store).id
    (weights,) = store.glob("artifacts/checkpoint/*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    damaged = kept(store)
    rate.write_text("0.2")
    with monkeypatch.context() as patch:
        patch.setattr(repair, "mend", killed)
        assert status(["verify", run, "--repair", "--store", str(store)]) == 130
    assert status(["verify", run, "--repair", "--store", str(store)]) == 2
    assert capsys.readouterr().err.rstrip().endswith("delete that folder, and run the configuration anew")
    assert kept(store) == damaged

    rate.write_text("0.1")
    with monkeypatch.context() as patch:
        patch.setattr(aside, "drop", killed)
        assert status(["verify", run, "--repair", "--store", str(store)]) == 130
    assert status(["verify", run, "--store", str(store)]) == 1
    assert status(["verify", run, "--repair", "--store", str(store)]) == 0
    assert kept(store) == before
