"""Runs that score candidates alone: the full scan's numbers at the same ids, what they state, how they resume, what they refuse."""

import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import BertModel

import tda
from flows import cli
from tasks.uses import OF_PLANS, names_of_run
from tda.results import NotStored, Run, list_runs, open_run
from tests.flows.processes import forked
from tests.flows.runs import PROBLEM, attribute, objects, wait_until, write_config
from tests.tda import language_models as tiny

SPOKEN = (
    PROBLEM
    + """
WORDS = "the a cat dog sees eats fish today again".split()

class Spoken(Tiny):
    def text(self, split, i):
        number = i if split == "train" else 3 * i + 1
        return " ".join(WORDS[(number * k + k // 2) % 9] for k in (1, 2, 4))
    def gold(self, query):
        return [4 * query, query]

class Before(Spoken):
    def __init__(self, examples=31, seed=5, **rest):
        super().__init__(examples=examples, seed=seed, **rest)

class Far(Spoken):
    def gold(self, query):
        return [query, 10 * query]

class Mute(Spoken):
    def text(self, split, i):
        return "..." if split == "train" and i == 5 else " " if split == "query" and i == 3 else "a cat"

class Alien(Spoken):
    def text(self, split, i):
        return "fish" if split == "query" and i == 2 else "a cat"
"""
)
CONFIG = """
problem = "tiny.py:Spoken"
shard_size = 4
query_block = 3
[[methods]]
name = "graddot"
[[methods]]
name = "bif"
draws = 24
burn_in = 8
thinning = 2
segment = 10
together = 2
step_size = 0.01
localization = 5.0
batch_size = 8
[[methods]]
name = "multistage"
proximity = 0.5
fisher = "exact"
[methods.pretraining]
problem = "tiny.py:Before"
damping = 0.1
"""
CHOSEN = """
[candidates]
bm25 = 4
embedding = 3
model = "encoder"
gold = true
random = 2
"""
KILLED = """
problem = "tiny.py:Spoken"
problem_options = {traps = "TRAPS"}
shard_size = 2
query_block = 3
[candidates]
bm25 = 4
random = 4
[[methods]]
name = "graddot"
[cluster]
workers = 1
"""
ON = CHOSEN + 'on = "pretraining"\n'


def config(folder: Path, more: str = "", text: str = CONFIG) -> Path:
    file = write_config(folder, text + more, SPOKEN)
    if not (folder / "encoder").exists():
        tiny.drawn(BertModel, tiny.CONFIGS["BERT"]).save_pretrained(folder / "encoder")
        tiny.save_tokenizer(folder / "encoder")
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, single: str) -> dict[str, Run]:
    """The full scan, candidates of the run's own training set, and candidates of the stage before."""
    folder = tmp_path_factory.mktemp("candidates")
    each = {"whole": "", "train": CHOSEN, "pretraining": ON}
    return {name: attribute(config(folder / "config", more), f"{folder}/store", single)[1] for name, more in each.items()}


@pytest.mark.parametrize("on", ["train", "pretraining"])
def test_candidates_score_as_in_the_full_scan(runs: dict[str, Run], on: str) -> None:
    found, whole = runs[on].candidates, runs["whole"]
    full = whole.influence if on == "train" else whole.influence_on(on)
    ids = found["candidate_id"].to_numpy()
    real = ids >= 0
    assert 5 <= real.sum(1).min() < real.sum(1).max() < full.sizes["train"], "rows of different lengths, none of them complete"
    assert not (np.diff(real.astype(int)) > 0).any(), "padding is at the end"
    assert found["method"].to_numpy().tolist() == full["method"].to_numpy().tolist()
    for name, scores in [("influence", full)] + ([("stderr", whole.stderr)] if on == "train" else []):
        at_ids = np.stack([scores[:, q].to_numpy()[:, row] for q, row in enumerate(ids)], 1)
        values = found[name].to_numpy()
        assert values.dtype == np.float32
        np.testing.assert_allclose(values[:, real], at_ids[:, real], rtol=1e-6)
        assert np.isnan(values[:, ~real]).all()
    labels = full["train_label"].to_numpy()
    assert (found["candidate_label"].to_numpy()[real] == labels[ids[real]]).all()
    if on == "train":
        np.testing.assert_allclose(found["loss"].to_numpy()[real], whole.train_loss.to_numpy()[ids[real]], rtol=1e-6)
    np.testing.assert_allclose(runs[on].query_measurement, whole.query_measurement)


def test_the_other_training_set_of_a_run_is_scored_whole(runs: dict[str, Run]) -> None:
    np.testing.assert_array_equal(runs["pretraining"].influence, runs["whole"].influence)
    np.testing.assert_array_equal(runs["train"].influence_on("pretraining"), runs["whole"].influence_on("pretraining"))


def test_each_source_names_what_it_should(runs: dict[str, Run]) -> None:
    found = runs["train"].candidates
    ids, source = found["candidate_id"].to_numpy(), found["candidate_source"].to_numpy()
    assert (source[ids < 0] == 0).all()
    for query, (row, bits) in enumerate(zip(ids, source, strict=True)):
        assert {*row[bits & 4 > 0].tolist()} == {query, 4 * query}
        counts = [int((bits & bit > 0).sum()) for bit in (1, 2, 8)]
        assert counts == [4, 3, 2]
    told = runs["train"].manifest["candidates"]
    assert told["from"] == {"bm25": 4, "embedding": 3, "gold": 1.8, "random": 2}
    assert told["different"] == len(np.unique(ids[ids >= 0]))


def test_top_ranks_the_candidates_and_says_of_how_many(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    for run, on in ((runs["train"], None), (runs["pretraining"], "pretraining")):
        row = run.candidates["influence"].loc["multistage", 2]
        ids, scores = row["candidate_id"].to_numpy(), row.to_numpy()
        table = run.top(2, k=3, on=on)
        assert table["train"].tolist() == ids[np.argsort(scores)][:3].tolist()
        assert table.columns.tolist() == ["rank", "train", "label", "score", "source"]
        examples = 23 if on is None else 31
        assert table.attrs["of"] == f"{(ids >= 0).sum()} candidates of {examples} training examples"
        more = ["--on", on] if on else []
        assert cli.status(["top", run.id, "-q", "2", "--store", run.store, *more]) == 0
        assert f"of {table.attrs['of']}; others were not scored" in capsys.readouterr().out
    assert runs["pretraining"].top(2, k=3)["train"].tolist() == runs["whole"].top(2, k=3)["train"].tolist()


def test_what_was_not_scored_is_said_where_it_is_looked_for(runs: dict[str, Run]) -> None:
    own, stage = runs["train"], runs["pretraining"]
    for ask in (lambda: own.influence, lambda: stage.influence_on("pretraining"), lambda: own.stderr, lambda: own.train_loss):
        with pytest.raises(NotStored, match=r"scored candidates only: run\.candidates has"):
            ask()
    with pytest.raises(NotStored, match=r"scored all training examples: run\.influence has them"):
        _ = runs["whole"].candidates
    for run, on, examples in ((own, "train", 23), (stage, "pretraining", 31)):
        (note,) = [line for line in run.manifest["notes"] if "candidates" in line]
        assert note.startswith(f"{on}: only candidates were scored (bm25, embedding, gold, random)")
        assert f" of {examples} training examples per query" in note
        page = Path(f"{run.url.removeprefix('file://')}/report.html").read_text()
        assert note in page
        assert f"lower the loss, of {(run.candidates['candidate_id'][0] >= 0).sum().item()} candidates" in page
    assert own.trajectories.sizes["train"] == 23


def test_candidates_are_found_once(runs: dict[str, Run], tmp_path: Path, single: str) -> None:
    own, stage = runs["train"], runs["pretraining"]
    assert own.manifest["reused"]["candidates"] is False
    file = config(Path(own.manifest["config"]["problem"].rpartition("/")[0]), CHOSEN)
    summary, again = attribute(file, own.store, single)
    assert "candidates" in summary.reused
    assert again.id != own.id
    np.testing.assert_array_equal(again.candidates["candidate_id"], own.candidates["candidate_id"])
    assert stage.manifest["candidates"]["fingerprint"] != own.manifest["candidates"]["fingerprint"]


def test_a_run_names_every_artifact_it_made_so_that_none_is_pruned_while_it_stays(runs: dict[str, Run]) -> None:
    named = {name for run in list_runs(runs["whole"].store)["run"] for name in _named(open_run(runs["whole"].store, run))}
    root = Path(runs["whole"].store.removeprefix("file://")) / "artifacts"
    made = {path.name: path.parent.name for path in root.glob("*/*") if path.parent.name not in (*OF_PLANS, "checkpoint")}
    assert {"candidates", "embeddings", "factors", "directions", "trajectories"} <= set(made.values())
    assert {name: kind for name, kind in made.items() if name not in named} == {}


def _named(run: Run) -> set[str]:
    return names_of_run(run.url, run.manifest)


def test_the_example_of_the_page_runs(tmp_path: Path, single: str) -> None:
    file = Path(__file__).parents[2] / "docs" / "examples" / "candidates.toml"
    _, run = attribute(file, f"{tmp_path}/store", single, "problem_options.epochs=1", 'methods=[{name="graddot"}]')
    told = run.manifest["candidates"]
    assert told["from"] == {"bm25": 8, "embedding": 8, "gold": 3, "random": 4}, "each fact is told in three ways"
    assert 8 <= told["per_query"]["least"] <= told["per_query"]["most"] <= 23, "what several sources name is scored once"


@pytest.mark.soak
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, single: str, capsys: pytest.CaptureFixture[str]) -> None:
    traps = tmp_path / "traps"
    traps.mkdir()
    file = config(tmp_path / "config", text=KILLED.replace("TRAPS", str(traps)))
    (traps / "slow").touch()
    store = tmp_path / "store"
    words = ("run", str(file), "--store", str(store), "--set", single)
    process = forked(tmp_path / "run.log", *words)
    wait_until(lambda: len(list(store.glob("runs/*/receipts/pieces/*.json"))) >= 3, process, seconds=120)
    process.kill()
    process.communicate()
    (traps / "slow").unlink()
    receipts = {each: each.stat().st_mtime_ns for each in store.glob("runs/*/receipts/pieces/*.json")}
    status, err = cli.status(list(words)), capsys.readouterr().err
    assert status == 0, err
    assert "resuming run" in err
    assert {each: each.stat().st_mtime_ns for each in receipts} == receipts
    assert not list(store.glob("runs/*/receipts/pieces/*.safetensors")), "the pieces are gone once they are put together"
    _, undisturbed = attribute(file, f"{tmp_path}/undisturbed", single)
    run = tda.open_run(str(store))
    same = [{name: data.replace(r.id.encode(), b"") for name, data in objects(f"{r.url}/results.zarr").items()} for r in (run, undisturbed)]
    assert same[0] == same[1]


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prefect_api: None):
    """`tda COMMAND` on a configuration: the one line that it prints. It must end with status 2 and write nothing."""
    monkeypatch.delenv("TDA_STORE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(more: str, *overrides: str, verb: str = "run") -> str:
        store = tmp_path / "store"
        sets = [word for each in overrides for word in ("--set", each)]
        file = config(tmp_path / "config", more)
        capsys.readouterr()
        assert cli.status([verb, str(file), "--store", str(store), *sets]) == cli.BAD_INPUT
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1, printed.err
        assert not store.exists()
        return printed.err

    return run


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["candidates={}"], "candidates asks for none: set bm25, embedding, gold or random"),
        (["candidates={bm25=0, random=0}"], "candidates asks for none"),
        (["candidates={embedding=3}"], 'candidates.embedding = 3 needs candidates.model; add model = "folder of an encoder"'),
        (['candidates={bm25=3, model="encoder"}'], "is used only with candidates.embedding"),
        (["candidates={bm25=-1}"], "candidates.bm25 must be at least 0, got -1"),
        (["candidates={bm2=1}"], 'unknown key "candidates.bm2"; did you mean "bm25"?'),
        (["candidates={bm25=24}"], "candidates.bm25 = 24 is more than the 23 training examples of 'train'"),
        (['candidates={random=32, on="pretraining"}'], "candidates.random = 32 is more than the 31 training examples of 'pretraining'"),
        (['candidates={bm25=1, on="fine-tuning"}'], 'candidates.on = "fine-tuning" is no training set of this run; it has train, pretra'),
        (['candidates={embedding=1, model="nowhere"}'], "config/nowhere is no folder"),
        (['candidates={embedding=1, model="."}'], "has no config.json"),
        (["candidates={bm25=1}", 'problem="tiny.py:Tiny"'], "query example 0 of Tiny is no text"),
        (["candidates={gold=true}", 'problem="tiny.py:Tiny"'], "Tiny.gold(0) names nothing; define gold(query) -> ids"),
        (["candidates={gold=true}", 'problem="tiny.py:Far"'], "Far.gold(3) names example 30 of 'train', which has 23, counted from 0"),
        (["candidates={bm25=1}", 'problem="tiny.py:Mute"'], "query example 3 of Mute is an empty text"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused_before_anything_is_written(told, overrides, words) -> None:
    line = told("", *overrides)
    assert words in line
    assert "Traceback" not in line


def test_ensembles_and_evaluations_need_all_scores(told) -> None:
    plain = 'methods=[{name="graddot"}]'
    assert "ensemble = 2 averages scores of all training examples" in told(CHOSEN, "ensemble=2", plain)
    assert "[candidates] leaves some out; remove the table" in told(CHOSEN, plain, verb="evaluate")


def test_a_query_without_a_candidate_is_told_by_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], single: str) -> None:
    sets = ["candidates={bm25=2}", 'problem="tiny.py:Alien"', 'methods=[{name="graddot"}]', single]
    words = [word for each in sets for word in ("--set", each)]
    assert cli.status(["run", str(config(tmp_path / "config")), "--store", f"{tmp_path}/store", *words]) == cli.BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "query 2 has no candidate by bm25; add others, such as random = 10 in [candidates]" in line
