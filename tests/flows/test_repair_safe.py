"""A repair loses nothing that is intact: what cannot be made again as it was is put back, and what belongs to nothing is left alone."""

from pathlib import Path

import pytest

from flows.cli import status
from tests.flows.runs import PROBLEM, attribute, objects, write_config

CONFIG = """
problem = "tiny.py:Tiny"
shard_size = 8
methods = [{name = "graddot"}]
cluster = {workers = 1}
"""


def kept(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in objects(str(store)).items() if not name.endswith(("begun.json", "seconds.json"))}


def test_weights_that_training_does_not_give_again_are_put_back_and_the_message_says_how_to_go_on(
    single: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate, store = tmp_path / "rate", tmp_path / "store"
    rate.write_text("0.1")
    unseeded = PROBLEM.replace(
        "torch.optim.SGD(model.parameters(), 0.1)", f"torch.optim.SGD(model.parameters(), float(Path('{rate}').read_text()))"
    )
    config = write_config(tmp_path / "config", CONFIG, unseeded)
    attribute(config, str(store), single)
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
