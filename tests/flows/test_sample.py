"""BIF in whole runs: the artifact, the scores with their errors, the report, the command `tda sample`, and what is refused."""

import hashlib
import tomllib
from pathlib import Path

import numpy as np
import pytest

from flows import cli
from flows.config import load_config
from flows.evaluate import evaluate_run
from tda import location, open_run
from tda.errors import InputError
from tda.results import NotStored, Run
from tests.flows.runs import CONFIG, PROBLEM, attribute, objects, write_config

BIF = """
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
"""
TEXT = f"""
problem = "tiny.py:Tiny"
shard_size = 6
query_block = 3
[[methods]]
name = "graddot"
{BIF}{BIF}
label = "correlated"
normalized = true
"""
TOKENS = f"""
problem = "tda.problems.sentences:Sentences"
problem_options = {{examples = 12, queries = 3, epochs = 1}}
{BIF.replace("0.01", "0.001")}
tokens = true
{BIF.replace("0.01", "0.001")}
tokens = true
label = "correlated"
normalized = true
[evaluation]
subsets = 4
seeds = 2
draws = 100
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bif")


@pytest.fixture(scope="module")
def run(folder: Path, cluster: str) -> Run:
    return attribute(write_config(folder / "config", TEXT), f"{folder}/store", cluster)[1]


def test_one_worker_stores_the_bytes_of_two(run: Run, folder: Path, single: str) -> None:
    other = attribute(write_config(folder / "config", TEXT), f"{folder}/other", single)[1]
    assert other.manifest["fingerprints"]["trajectories"] == run.manifest["fingerprints"]["trajectories"]
    found = [_digests(each) for each in (run, other)]
    assert len(found[0]) > 30
    assert found[0] == found[1]


def _digests(run: Run) -> dict[str, str]:
    (mark,) = run.manifest["fingerprints"]["trajectories"].values()
    each = objects(f"{run.url}/results.zarr") | objects(location.join(run.store, "artifacts", "trajectories", mark, "trajectories.zarr"))
    return {name: hashlib.sha256(data.replace(run.id.encode(), b"RUN")).hexdigest() for name, data in each.items()}


def test_scores_have_errors_where_a_method_samples(run: Run) -> None:
    assert np.isfinite(run.influence.to_numpy()).all()
    errors = run.stderr.to_numpy()
    assert np.isnan(errors[0]).all()
    assert (errors[1:] > 0).all()
    assert (run.self_influence.sel(method="bif").to_numpy() < 0).all()
    assert run.manifest["units"]["correlated"] == "correlation"
    assert run.manifest["damping"]["bif"] == pytest.approx(dict.fromkeys(run.manifest["damping"]["bif"], 5.0 / 23))


def test_trajectories_open_lazily_and_say_how_they_were_sampled(run: Run) -> None:
    found = run.trajectories
    assert dict(found.sizes) == {"chain": 4, "draw": 24, "train": 23, "query": 5, "step": 56}
    assert found["loss_train"].dims == ("chain", "draw", "train")
    assert found.attrs["step_size_convention"].startswith("w <- w - (step_size/2)")
    assert found.attrs["lost"] == {}
    assert found["loss_train"].coords["train_label"].size == 23
    mean = found["loss_train"].to_numpy().mean(2, dtype=np.float64)
    np.testing.assert_allclose(found["mean_loss_train"], mean, rtol=1e-5, atol=1e-8)
    assert run.trajectories_of("bif").identical(found)
    with pytest.raises(NotStored, match="no trajectories of 'graddot'"):
        run.trajectories_of("graddot")
    with pytest.raises(NotStored, match="tokens = true"):
        run.token_influence(0, [0])


def test_the_manifest_and_the_page_judge_the_chains(run: Run) -> None:
    told = run.manifest["sampling"]["bif"]
    assert told["chains"] == 4
    assert told["verdict"], "24 draws are too few"
    assert all(f"bif: {sentence}" in run.manifest["notes"] for sentence in told["verdict"])
    page = location.read_bytes(f"{run.url}/report.html").decode()
    section = page[page.index('<section id="sampling">') :]
    assert section.count("<polyline") == 2 * 3 * 4
    assert told["verdict"][0].replace("'", "&#39;") in section


def test_sample_reuses_the_chains_and_prints_what_came_of_them(
    run: Run, folder: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", str(folder / "config/run.toml"), "--store", f"{folder}/store", "--set", cluster]
    assert cli.status(arguments) == 0
    printed = capsys.readouterr().out
    assert "R-hat" in printed
    assert "bif: reused from" in printed
    assert run.manifest["sampling"]["bif"]["verdict"][0] in printed
    assert "graddot" not in printed


def test_tune_prints_a_table_to_paste_and_writes_nothing(run: Run, folder: Path, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(objects(f"{run.store}/artifacts/trajectories"))
    text = 'problem = "tiny.py:Tiny"\nensemble = 2\n[[methods]]\nname = "bif"\ndamping = [0.5, 2.0]\nbatch_size = 8\nnormalized = true\n'
    config = write_config(folder / "tune", text, PROBLEM)
    assert cli.status(["sample", str(config), "--tune", "--store", f"{folder}/store", "--set", cluster]) == 0
    printed = capsys.readouterr().out
    tables = tomllib.loads(printed)["methods"]
    assert [table["label"] for table in tables] == ["bif-0.5", "bif-2"]
    assert all(table["normalized"] for table in tables)
    assert [table["localization"] / table["n_beta"] for table in tables] == pytest.approx([0.5, 2.0], rel=1e-3)
    assert "# step_size = " in printed
    assert len(objects(f"{run.store}/artifacts/trajectories")) == before
    pasted = write_config(folder / "pasted", 'problem = "tiny.py:Tiny"\n' + printed)
    assert [table["name"] for table in load_config(pasted).methods] == ["bif", "bif"]


def test_tokens_are_scored_and_shaded_and_the_league_table_has_bif(folder: Path, single: str) -> None:
    config = load_config(write_config(folder / "tokens", TOKENS), [single], f"{folder}/tokens-store")
    done = evaluate_run(config, "tda evaluate")
    run = open_run(done.store, done.run_id)
    assert run.evaluation["lds"].sizes["method"] == 2
    assert len(set(run.manifest["fingerprints"]["trajectories"].values())) == 1
    tokens = run.token_influence(1, [3, 7], "bif")
    assert tokens.dims == ("train", "train_token")
    expected = run.influence.loc["bif", 1].sel(train=[3, 7])
    np.testing.assert_allclose(tokens.sum("train_token"), expected, rtol=1e-4, atol=1e-6)
    both = run.token_influence(1, [3, 7], "bif", by_query_token=True)
    np.testing.assert_allclose(both.sum(["train_token", "query_token"]), expected, rtol=1e-4, atol=1e-6)
    for of_tokens in (run.token_influence(1, [3, 7]), run.token_influence(1, [3, 7], by_query_token=True)):
        assert of_tokens.attrs["units"] == "correlation"
        assert 0.1 < float(abs(of_tokens).max()) <= 1
    with pytest.raises(InputError, match="no train example 12"):
        run.token_influence(1, [12])
    page = location.read_bytes(f"{run.url}/report.html").decode()
    assert page.count('<p class="tokens">') == 2 * 3 * 4
    assert 'class="token helpful-6"' in page or 'class="token harmful-6"' in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("chains = 1", "chains is 1; R-hat and standard errors compare chains: give at least 2"),
        ("burn_in = 100\nthinning = 2\ndraws = 24", "burn_in is 100, past the 48 steps of the draws"),
        ("step_size = 0.0", "step_size is 0.0; it must be above 0"),
        ("n_beta = -3", 'n_beta is -3.0; it must be above 0; "auto" is N'),
        ('compiled = "yes"', "compiled = 'yes': Input should be a valid boolean or 'auto'"),
        ('sampler = "hmc"', "Input should be 'sgld' or 'rmsprop'"),
        ("draws = 4\nburn_in = 0", "draws is 4; standard errors and R-hat need at least 16"),
        ("localization = 3.0\ndamping = 0.1", "localization is 3.0 and damping 0.1, which says the same"),
        ("damping = 0", "damping is 0, and nothing would hold the flat directions: give it a number above 0"),
        ('step_size = "fast"', "step_size = 'fast': Input should be a valid number or 'auto'"),
        ('batch_size = "half"', "batch_size = 'half': Input should be a valid integer or 'full'"),
        ("drows = 4", "unknown option 'drows'; did you mean 'draws'?"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path: Path, changes: str, said: str) -> None:
    config = write_config(tmp_path, f'problem = "tiny.py:Tiny"\n[[methods]]\nname = "bif"\n{changes}\n')
    with pytest.raises(InputError) as refused:
        load_config(config)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


NORMALISED = PROBLEM.replace("nn.LayerNorm(5)", "nn.BatchNorm1d(5, track_running_stats=False)")
MOODY = PROBLEM.replace(
    "    def fit(",
    "    def predict(self, model, batch):\n        assert model.training, 'only in train mode'\n"
    "        return model(batch.inputs)\n    def fit(",
)


@pytest.mark.parametrize(
    ("text", "problem", "said"),
    [
        (BIF + "tokens = true", PROBLEM, "tokens = true needs a loss per token, and the likelihood is Categorical"),
        (BIF.replace("batch_size = 8", "batch_size = 64"), PROBLEM, "batch_size is 64, but there are 23 training examples"),
        (BIF, NORMALISED, "use running statistics"),
        (BIF, MOODY, "only in train mode"),
        (CONFIG.partition("[[")[1] + "methods]]\nname = 'graddot'", PROBLEM, "no method of the configuration samples"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_is_written(
    tmp_path: Path, prefect_api: None, capsys: pytest.CaptureFixture[str], text: str, problem: str, said: str
) -> None:
    config = write_config(tmp_path / "config", f'problem = "tiny.py:Tiny"\n{text}', problem)
    assert cli.status(["sample", str(config), "--store", f"{tmp_path}/store"]) == cli.BAD_INPUT
    assert said in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_step_size_over_the_bound_is_warned_of_before_the_chains_start(
    folder: Path, single: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f'problem = "tiny.py:Tiny"\n{BIF}'.replace("step_size = 0.01", "step_size = 50.0")
    config = write_config(folder / "large", text)
    assert cli.status(["sample", str(config), "--store", f"{folder}/large-store", "--set", single]) == cli.BAD_INPUT
    said = capfd.readouterr().err
    assert "is not below the stability bound" in " ".join(said.split())
    assert "all 4 chains were lost: chain 0 was stopped at step" in " ".join(said.split())
    assert _positions(said, "prepare chains", "stability bound", "were lost") == "in order"


def _positions(text: str, *parts: str) -> str:
    places = [text.index(part.split()[0]) for part in parts]
    return "in order" if places == sorted(places) else f"{places}"
