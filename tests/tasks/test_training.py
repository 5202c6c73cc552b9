"""Training is done once, and its result depends on the seed alone."""

from dataclasses import replace
from pathlib import Path

from tasks import training
from tda import location
from tests.flows.runs import objects
from tests.tasks.jobs import planned


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path) -> None:
    subject = replace(planned(tmp_path / "config", f"{tmp_path}/store").subject, checkpoint="", weights="", inputs="")
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training.train((subject, seed, f"file://{tmp_path}/{name}"))
        found[name] = objects(f"file://{tmp_path}/{name}")
    assert set(found["a"]) == {"weights.safetensors", "complete.json"}
    assert found["a"] == found["b"]
    assert found["a"]["weights.safetensors"] != found["c"]["weights.safetensors"]


def test_what_is_complete_is_not_trained_again_and_what_is_half_done_is(tmp_path: Path) -> None:
    subject = replace(planned(tmp_path / "config", f"{tmp_path}/store").subject, checkpoint="", weights="", inputs="")
    url, folder = f"file://{tmp_path}/artifact", tmp_path / "artifact"
    training.train((subject, 0, url))
    whole = objects(url)
    (folder / "weights.safetensors").write_bytes(b"marked")
    training.train((subject, 0, url))
    assert location.read_bytes(f"{url}/weights.safetensors") == b"marked"
    (folder / "complete.json").unlink()
    training.train((subject, 0, url))
    assert objects(url) == whole
