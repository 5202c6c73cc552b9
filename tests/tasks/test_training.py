"""Training is done once, and its result depends on the seed alone; what it passes through is kept."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flows.attribute import request_of
from flows.config import load_config
from tasks import prepare, training
from tasks.subject import Subject, read_checkpoint
from tda import location
from tda.errors import InputError
from tda.methods import parse_all
from tda.methods.sweep import expand
from tda.problem import load_problem
from tests.flows.runs import PROBLEM, objects, write_config

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SILENT = PROBLEM.replace("on_checkpoint(model=model, learning_rate=0.1, step=step)", "pass")
MANY = '{"examples": 120}'


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path: Path) -> None:
    subject = made(tmp_path / "config", SILENT)
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training.train((subject, seed, f"file://{tmp_path}/{name}"))
        found[name] = objects(f"file://{tmp_path}/{name}")
    assert set(found["a"]) == {"weights.safetensors", "complete.json"}
    assert found["a"] == found["b"]
    assert found["a"]["weights.safetensors"] != found["c"]["weights.safetensors"]


def test_what_is_complete_is_not_trained_again_and_what_is_half_done_is(tmp_path: Path) -> None:
    subject = made(tmp_path / "config")
    url, folder = f"file://{tmp_path}/artifact", tmp_path / "artifact"
    training.train((subject, 0, url))
    whole = objects(url)
    (folder / "weights.safetensors").write_bytes(b"marked")
    training.train((subject, 0, url))
    assert location.read_bytes(f"{url}/weights.safetensors") == b"marked"
    (folder / "complete.json").unlink()
    training.train((subject, 0, url))
    assert objects(url) == whole


def made(folder: Path, problem: str = PROBLEM) -> Subject:
    write_config(folder, problem=problem)
    return Subject(f"{folder}/tiny.py:Tiny", "{}", "", ("*",), (), "auto")


def test_checkpoints_on_the_way_are_kept_with_their_trajectory(tmp_path: Path) -> None:
    subject, url = made(tmp_path), f"file://{tmp_path}/artifact"
    training.train((replace(subject, options=MANY), 0, url))
    found = training.read_trajectory(f"{url}/weights.safetensors")
    assert found.whole
    steps = [saved.step for saved in found.saved]
    assert steps == list(range(0, 121, 6))
    assert [saved.time for saved in found.saved] == pytest.approx([0.1 * step for step in steps])
    assert {name for name in objects(url) if name.startswith("steps/")} == {saved.name for saved in found.saved}
    last, whole = (read_checkpoint(f"{url}/{name}") for name in (found.saved[-1].name, "weights.safetensors"))
    assert all(torch.equal(last[name], whole[name]) for name in whole)
    first = training.load_problem(subject.problem).model().state_dict()
    start = read_checkpoint(f"{url}/{found.saved[0].name}")
    assert all(torch.equal(start[name], first[name]) for name in first)


def test_a_training_that_was_killed_and_starts_again_leaves_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, undisturbed, url = (made(tmp_path), *(f"file://{tmp_path}/{name}" for name in ("undisturbed", "killed")))
    training.train((replace(subject, options=MANY), 0, undisturbed))
    written, write = [], training.storage.write_bytes

    def killed(*arguments: object) -> None:
        if len(written) == 25:
            raise KeyboardInterrupt
        written.append(arguments)
        write(*arguments)

    monkeypatch.setattr(training.storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        training.train((replace(subject, options=MANY), 0, url))
    monkeypatch.undo()
    left = objects(url)
    assert "complete.json" not in left
    training.train((replace(subject, options=MANY), 0, url))
    assert digests(url) == digests(undisturbed)


def test_a_fit_that_reports_nothing_is_told_to_report(tmp_path: Path) -> None:
    subject, url = made(tmp_path, SILENT), f"file://{tmp_path}/artifact"
    training.train((subject, 0, url))
    said = _refused(f"{url}/weights.safetensors")
    assert said.startswith("source needs the training's checkpoints")
    assert f"the fit that ended with {url}/weights.safetensors reported none; let it call on_checkpoint(model=" in said
    assert "leave `checkpoint` out" not in said


def test_a_checkpoint_that_no_run_trained_is_told_to_be_left_out(tmp_path: Path) -> None:
    subject, url = made(tmp_path), f"file://{tmp_path}/artifact"
    training.train((subject, 0, url))
    (tmp_path / "mine.safetensors").write_bytes((tmp_path / "artifact" / "weights.safetensors").read_bytes())
    said = _refused(f"file://{tmp_path}/mine.safetensors")
    assert f"there are none beside file://{tmp_path}/mine.safetensors; leave `checkpoint` out" in said
    assert "on_checkpoint(model=" in said


@pytest.mark.parametrize("other", ["the weights are of another training", "the trajectory does not say of which weights it is"])
def test_a_trajectory_of_other_weights_is_refused(tmp_path: Path, other: str) -> None:
    subject, folder = made(tmp_path / "config"), tmp_path / "artifact"
    training.train((subject, 0, f"file://{folder}"))
    if other.startswith("the weights"):
        training.train((subject, 1, f"file://{tmp_path}/other"))
        (folder / "weights.safetensors").write_bytes((tmp_path / "other" / "weights.safetensors").read_bytes())
    else:
        found = json.loads((folder / "trajectory.json").read_text())
        (folder / "trajectory.json").write_text(json.dumps({name: value for name, value in found.items() if name != "digest"}))
    said = _refused(f"file://{folder}/weights.safetensors")
    assert f"file://{folder}/trajectory.json is not of the training that ended with file://{folder}/weights.safetensors; put back" in said


def _refused(weights: str) -> str:
    with pytest.raises(InputError) as refused:
        training.read_trajectory(weights)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("evaluate-*.toml")), ids=lambda file: file.stem)
def test_every_example_of_an_evaluation_trains_for_as_many_checkpoints_as_its_methods_need(file: Path) -> None:
    config = load_config(file)
    problem = load_problem(config.problem, config.problem_options)
    for method in parse_all([swept.table for swept in expand(config.methods)]):
        if method.meets != "final":
            training.check_recipe(method, problem, len(problem.train_data()))


@pytest.mark.parametrize(
    ("table", "epochs", "words"),
    [
        ({"name": "tracin"}, 4, "tracin: checkpoints = 5: .* at most 4 checkpoints, .*; the recipe reports one after each of its 4 epochs"),
        ({"name": "trak", "models": 30}, 100, "trak: models = 30: of the training's 100 reports"),
        ({"name": "fast_source"}, 2, "fast_source: segments = 3: .* at most 2 segments"),
        ({"name": "tracin"}, 5, None),
        ({"name": "trak"}, 1, None),
    ],
)
def test_a_recipe_with_too_few_epochs_is_refused_before_it_trains(tmp_path: Path, table: dict, epochs: int, words: str | None) -> None:
    text = 'problem = "tda.problems.diabetes:Diabetes"\n[problem_options]\n' + f"epochs = {epochs}\n[[methods]]\n"
    text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
    request = request_of(load_config(write_config(tmp_path / "config", text), (), f"file://{tmp_path}/store"))
    with pytest.raises(InputError, match=f"^{words}") if words else nullcontext():
        prepare.examine(request)
    assert not (tmp_path / "store").exists()


def test_learning_rates_that_a_schedule_keeps_in_tensors_do_not_end_a_training(tmp_path: Path) -> None:
    subject, url = made(tmp_path, PROBLEM.replace("learning_rate=0.1", "learning_rate=torch.tensor(0.1)")), f"file://{tmp_path}/artifact"
    training.train((subject, 0, url))
    saved = training.read_trajectory(f"{url}/weights.safetensors").saved
    assert [one.time for one in saved] == pytest.approx([0.1 * one.step for one in saved])


def test_a_report_that_makes_no_sense_ends_the_training(tmp_path: Path) -> None:
    subject = made(tmp_path, PROBLEM.replace("learning_rate=0.1", "learning_rate=-1"))
    with pytest.raises(InputError, match="learning_rate=-1"):
        training.train((subject, 0, f"file://{tmp_path}/artifact"))


def digests(url: str) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in objects(url).items()}
