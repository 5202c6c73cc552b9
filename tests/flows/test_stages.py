"""A run that attributes to the stages before its own: the same promises for their training sets, from end to end."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tda
from flows import cli
from tda.carried import carry
from tda.curvature.fit import fit_factors
from tda.directions import query_gradients
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tda.problem import load_problem
from tda.results import NotStored
from tda.scoring import Scorer, score
from tests.flows.processes import forked
from tests.flows.runs import PROBLEM, attribute, objects, wait_until, write_config

STAGES = (
    PROBLEM
    + """
class Before(Tiny):
    def __init__(self, examples=31, seed=5, **rest):
        super().__init__(examples=examples, seed=seed, **rest)

class Oldest(Tiny):
    def __init__(self, examples=17, seed=6, **rest):
        super().__init__(examples=examples, seed=seed, **rest)

class Wider(Before):
    def model(self):
        layers = super().model()
        layers[3] = nn.Linear(5, 4, dtype=torch.float64)
        return layers

class Other(Before):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 3, dtype=torch.float64))

class Untrained(Before):
    fit = tda.Problem.fit
"""
)
NARROW = 'problem_options = {dtype = "float32"}'
METHOD = {"name": "multistage", "proximity": 0.5, "fisher": "exact"}
CONFIG = """
problem = "tiny.py:Tiny"
shard_size = 4
query_block = 3
[[methods]]
name = "ekfac"
fisher = "exact"
damping = 0.5
[[methods]]
name = "multistage"
proximity = 0.5
fisher = "exact"
[methods.pretraining]
problem = "tiny.py:Before"
damping = 0.1
"""
MIDDLE = """proximity = 0.25
[methods.pretraining.pretraining]
problem = "tiny.py:Oldest"
damping = 0.2
"""


def config(folder: Path, edit: tuple[str, str] = ("", ""), more: str = "") -> Path:
    assert edit[0] in CONFIG
    return write_config(folder, CONFIG.replace(*edit) + more, STAGES)


def opened(folder: Path, run: tda.results.Run, name: str, weights: str):
    """A stage's model at the weights that a run has used."""
    problem = load_problem(f"{folder}/tiny.py:{name}")
    model = problem.model()
    model.load_state_dict(load_file(weights.removeprefix("file://")))
    return inspect(problem, model, problem.train_data())


def chained(subjects, method):
    """Scores of every stage, the latest first, in this process and in float64."""

    def step(subject, inverse, asked):
        train = subject.problem.train_data()
        fits = [tuple(fit_factors(subject, train, fisher="exact", batch_size=64))]
        directions = inverse.directions(Work(subject, train, fits, 0, 64), asked).passes[0]
        scorer, ids = Scorer("multistage", directions, torch.ones(5)), range(len(train))
        return directions, score(subject, [scorer], train, ids, examples=len(ids), batch_size=64, self_influence=False).influence[0]

    gradients, _ = query_gradients(subjects[0], subjects[0].problem.query_data(), range(5), batch_size=5)
    directions, first = step(subjects[0], method, gradients)
    found = [first]
    for stage, later, earlier in zip(method.stages, subjects, subjects[1:], strict=False):
        asked = carry(later.blocks, directions, earlier.blocks, -stage.proximity, torch.float64)
        directions, scores = step(earlier, stage.inverse, asked)
        found.append(scores)
    return found


def weights_of(run, name):
    facts = run.manifest["stages"][name]
    return facts["checkpoint"]


def own_weights(store, run):
    """The checkpoint that the run trained itself, by its digest."""
    from tda import checkpoint

    wanted = run.manifest["fingerprints"]["checkpoint"]
    files = Path(store).glob("artifacts/checkpoint/*/weights.safetensors")
    return next(str(file) for file in files if checkpoint.digest(load_file(file)) == wanted)


def near(found, wanted):
    return float(np.abs(found.to_numpy() - wanted.numpy()).max() / wanted.abs().max()) < 1e-5


def test_a_run_scores_every_stage_as_the_chain_says(tmp_path: Path, single: str) -> None:
    file = config(tmp_path / "config", more=MIDDLE)
    store = f"{tmp_path}/store"
    _, run = attribute(file, store, single)
    names = ["pretraining", "pretraining.pretraining"]
    subjects = [opened(file.parent, run, "Tiny", own_weights(store, run))]
    subjects += [opened(file.parent, run, name, weights_of(run, stage)) for name, stage in zip(("Before", "Oldest"), names, strict=True)]
    before = {"problem": "x:B", "damping": 0.1, "proximity": 0.25, "pretraining": {"problem": "x:O", "damping": 0.2}}
    wanted = chained(subjects, parse(METHOD | {"pretraining": before}))
    assert near(run.influence.loc["multistage"], wanted[0])
    assert near(run.influence.loc["ekfac"], wanted[0]), "the proximity is the damping of the fine-tuned stage"
    for name, scores, count in zip(names, wanted[1:], (31, 17), strict=True):
        found = run.influence_on(name)
        assert found.sizes == {"method": 1, "query": 5, "train": count}
        assert near(found.sel(method="multistage"), scores)
        assert found.attrs["examples"] == count
        assert "train_label" in found.coords
        assert len(run.top(2, k=3, on=name)) == 3
        facts = run.manifest["stages"][name]
        assert facts["shared"]["share"] == 1
        assert set(facts["damping"]["multistage"].values()) == ({0.35} if name == "pretraining" else {0.2})
    with pytest.raises(NotStored, match=r"it has 'pretraining', 'pretraining\.pretraining'"):
        run.influence_on("fine-tuning")
    page = (Path(run.url.removeprefix("file://")) / "report.html").read_text()
    assert page.count("In pretraining.pretraining</h4>") == 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, single: str) -> tuple[Path, tda.results.Run]:
    """The configuration's file, and its run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = config(folder / "config")
    return file, attribute(file, f"{folder}/store", single)[1]


def test_training_starts_from_the_stage_before_and_a_long_way_is_warned_of(undisturbed: tuple[Path, tda.results.Run]) -> None:
    file, run = undisturbed
    problem = load_problem(f"{file.parent}/tiny.py:Tiny")
    model = problem.model()
    before = load_file(weights_of(run, "pretraining").removeprefix("file://"))
    model.load_state_dict(before)
    problem.fit(model, problem.train_data(), seed=0, on_checkpoint=lambda **_: None)
    found = load_file(own_weights(run.store.removeprefix("file://"), run))
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    moved, length = (torch.cat([t.flatten() for t in each]).norm() for each in ([found[n] - before[n] for n in before], before.values()))
    assert run.manifest["stages"]["pretraining"]["shift"] == pytest.approx(float(moved / length))
    assert float(moved / length) > 0.1
    assert any("more than 10%" in note for note in run.manifest["notes"])


def test_fits_and_checkpoints_of_a_stage_are_shared_with_runs_of_it_alone(tmp_path: Path, single: str) -> None:
    store = f"{tmp_path}/store"
    alone = CONFIG.partition('[[methods]]\nname = "multistage"')[0].replace(":Tiny", ":Before")
    attribute(write_config(tmp_path / "config", alone, STAGES), store, single)
    first, run = attribute(config(tmp_path / "config"), store, single)
    assert set(first.reused) == {"checkpoint (pretraining)", "factors (exact, pretraining)"}
    again, other = attribute(config(tmp_path / "config"), store, single, "methods.1.pretraining.damping=0.2")
    fresh = {name for name, was in other.manifest["reused"].items() if not was}
    assert fresh == {"directions (pretraining)"}
    assert not np.array_equal(run.influence_on("pretraining"), other.influence_on("pretraining"))
    assert np.array_equal(run.influence, other.influence)
    assert again.run_id != first.run_id


def test_a_new_head_takes_no_part_in_the_chain_where_that_is_allowed(tmp_path: Path, single: str) -> None:
    new = 'unmatched = "drop"\ninverse = "cg"\ntolerance = 1e-8\n[methods.pretraining]\nproblem = "tiny.py:Wider"'
    file = config(tmp_path / "config", ('[methods.pretraining]\nproblem = "tiny.py:Before"', new))
    _, run = attribute(file, f"{tmp_path}/store", single, 'methods.0={name = "graddot"}')
    facts = run.manifest["stages"]["pretraining"]["shared"]
    assert facts["only_later"] == facts["only_here"] == ["3.weight", "3.bias"]
    assert facts["share"] == pytest.approx((35 + 10) / (35 + 10 + 18))
    assert any("3.weight, 3.bias" in note for note in run.manifest["notes"])
    names = [("Tiny", own_weights(tmp_path / "store", run)), ("Wider", weights_of(run, "pretraining"))]
    subjects = [opened(file.parent, run, *each) for each in names]
    method = parse(METHOD | {"inverse": "cg", "tolerance": 1e-8, "pretraining": {"problem": "x:B", "damping": 0.1}})
    wanted = chained(subjects, method)
    assert near(run.influence_on("pretraining").loc["multistage"], wanted[1])
    for title in ("multistage", "multistage (pretraining)"):
        assert float(run.solve(title)["residual"][-1].max()) < 1e-8


def test_killed_in_a_stage_the_same_command_ends_the_run_with_the_same_bytes(
    undisturbed: tuple[Path, tda.results.Run], tmp_path: Path, single: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (file, whole), store = undisturbed, tmp_path / "store"
    words = ("run", str(file), "--store", str(store), "--set", single)
    process = forked(tmp_path / "run.log", *words)
    wait_until(lambda: len(list(store.glob("runs/*/stages/pretraining/receipts/scores/*"))) >= 1 or process.poll() is not None, seconds=120)
    process.kill()
    process.communicate()
    assert cli.status(list(words)) == 0, capsys.readouterr().err
    run = tda.open_run(str(store))
    for where in ("results.zarr", "stages/pretraining/results.zarr"):
        first, second = ({n: data.replace(r.id.encode(), b"") for n, data in objects(f"{r.url}/{where}").items()} for r in (whole, run))
        assert first == second
    assert len(list(store.glob("runs/*"))) == 1


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prefect_api: None):
    """`tda COMMAND` on the configuration, edited: the one line that it prints. It must end with status 2 and write nothing."""
    monkeypatch.delenv("TDA_STORE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(edit: tuple[str, str], *arguments: str, verb: str = "run") -> str:
        store = tmp_path / "store"
        assert cli.status([verb, str(config(tmp_path / "config", edit)), "--store", str(store), *arguments]) == cli.BAD_INPUT
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1, printed.err
        assert not store.exists()
        return printed.err

    return run


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("proximity = 0.5", "proximity = 0"), "proximity must be a finite number > 0"),
        (("proximity = 0.5", "proximity = -1.0"), "got -1.0 (method 'multistage')"),
        (("proximity = 0.5\n", ""), "missing option 'proximity' (method 'multistage')"),
        (('[methods.pretraining]\nproblem = "tiny.py:Before"\ndamping = 0.1', ""), "missing option 'pretraining'; it is a table"),
        (('problem = "tiny.py:Before"\n', ""), "missing option 'pretraining.problem'"),
        (("damping = 0.1", "dampign = 0.1"), "unknown option 'pretraining.dampign'; did you mean 'damping'?"),
        (("damping = 0.1", "damping = -0.1"), 'pretraining.damping must be a finite number >= 0 or "heuristic", got -0.1'),
        (("tiny.py:Before", "no.py:Before"), "no.py does not exist; the path is taken from the folder of the configuration"),
        (("tiny.py:Before", "tiny.py:Beforr"), "has no class Beforr"),
        (('"tiny.py:Tiny"', f'"tiny.py:Tiny"\nautocast = "bfloat16"\n{NARROW}'), 'autocast = "bfloat16" makes no sense with the float64'),
        (('"tiny.py:Tiny"', f'"tiny.py:Tiny"\nproducts = "bfloat16"\n{NARROW}'), 'products = "bfloat16" makes no sense with the float64'),
        (("tiny.py:Before", "tiny.py:Untrained"), "has no fit method and stage 'pretraining' no checkpoint; give one of them"),
        (("tiny.py:Before", "tiny.py:Wider"), "only in the fine-tuned model: 3.weight, 3.bias; only in pretraining: 3.weight, 3.bias"),
        (("tiny.py:Before", "tiny.py:Other"), "pretraining shares no attributed parameter with the model fine-tuned from it"),
        (("damping = 0.1", 'checkpoint = "nowhere.safetensors"'), "nowhere.safetensors does not exist"),
        (("query_block = 3", "query_block = 3\nensemble = 2"), "ensemble = 2 trains that many models, and multistage is about one"),
        (('"ekfac"\nfisher = "exact"\ndamping = 0.5', '"dtda"'), "dtda retrains models from fresh weights"),
    ],
)  # fmt: skip
def test_what_cannot_be_chained_is_refused_before_anything_is_written(told, edit, words) -> None:
    assert words in told(edit)


def test_a_checkpoint_of_another_architecture_is_refused_by_its_names(told, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    save_file({"0.weight": torch.ones(5, 7), "encoder.bias": torch.ones(3)}, tmp_path / "config" / "old.safetensors")
    line = told(("damping = 0.1", 'checkpoint = "old.safetensors"'))
    assert "old.safetensors does not fit the model" in line
    assert "unknown: encoder.bias" in line
    assert "0.weight (5, 7) instead of (5, 6)" in line


def test_an_evaluation_that_would_retrain_from_fresh_weights_is_refused(told) -> None:
    assert "tda evaluate retrains from fresh weights" in told(("", ""), verb="evaluate")
