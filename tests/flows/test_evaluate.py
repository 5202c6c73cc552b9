"""An evaluation from its file to its page: right where the answer is known, the same after a kill, refused in one line where it must be."""

import csv
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tda
from flows import cli, league, stages
from flows import evaluate as flow
from flows.config import load_config
from flows.evaluate import evaluate_run
from infra.cluster import ShardFailed
from tasks import evaluate as measuring
from tda import checkpoint, location, schema
from tda.errors import InputError
from tda.evaluation.ceiling import mean_ceiling
from tda.evaluation.lds import lds
from tda.evaluation.subsets import tuning
from tda.problem import load_problem
from tests.flows.processes import forked
from tests.flows.runs import attribute, objects, wait_until, write_config, written

# 30 examples in three classes, 8 queries, trained in milliseconds and many at once; a fifth of the labels is wrong.
PROBLEM = """
import multiprocessing
from pathlib import Path
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tda

class Tiny(tda.Problem):
    likelihood = tda.Categorical()
    def __init__(self, queries=8, trap='', recipe=True):
        self.queries, self.trap, self.with_recipe = queries, trap, recipe
        self.mislabelled = np.arange(30) % 5 == 0
    def model(self):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    def _data(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        x, centres = torch.randn(count, 4, generator=g, dtype=torch.float64), torch.eye(3, 4, dtype=torch.float64)
        y = torch.arange(count) % 3
        return x + 2 * centres[y], y
    def train_data(self):
        x, y = self._data(30, 0)
        return TensorDataset(x, torch.where(torch.arange(30) % 5 == 0, (y + 1) % 3, y))
    def query_data(self):
        return TensorDataset(*self._data(self.queries, 1))
    def recipe(self):
        return tda.Recipe(8, 10, 0.1, 0.9, 1e-3) if self.with_recipe else None
    def measurement(self, outputs, targets):
        found = self.likelihood.loss(outputs, targets)
        if self.trap and multiprocessing.parent_process() and Path(self.trap).exists():  # in workers, once the trap is set
            found[3] = torch.nan
        return found
"""

CONFIG = """
problem = "tiny.py:Tiny"
ensemble = 2
[evaluation]
alphas = [0.5, 0.7]
subsets = 10
seeds = 4
draws = 100
leave_one_out = 5
removal = [0.1, 0.3]
removal_queries = 2
retrainings = 2
randomised = true
[[methods]]
name = "graddot"
[[methods]]
name = "ekfac"
fisher = "exact"
damping = ["heuristic", 1e-3, 1e-1]
"""

RIDGE = """
problem = "tda.problems.diabetes:RidgeDiabetes"
problem_options = {queries = 12, penalty = 0.1}
dtype = "float64"
[evaluation]
alphas = [0.9]
subsets = 20
seeds = 1
tuning_queries = 0.0
draws = 100
leave_one_out = 6
retrainings = 1
[[methods]]
name = "graddot"
[[methods]]
name = "ggn"
damping = 0.1
"""


def evaluated(config: Path, store: str, *overrides: str):
    """Evaluate in this process: (summary, run)."""
    summary = evaluate_run(load_config(config, overrides, store), f"tda evaluate {config}")
    return summary, tda.open_run(store, summary.run_id)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), CONFIG, PROBLEM)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file://{tmp_path_factory.mktemp('store')}/store"


@pytest.fixture(scope="module")
def done(config: Path, store: str, cluster: str):
    return evaluated(config, store, cluster)


def table(url: str) -> list[dict[str, str]]:
    """The rows of a league table, without what a clock says."""
    rows = csv.DictReader(location.read_bytes(f"{url}/league.csv").decode().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_an_evaluation_is_one_dataset_with_the_truth_that_it_was_found_by(done) -> None:
    _, run = done
    data = run.evaluation
    assert data.masks.dims == ("alpha", "subset", "train")
    assert data.measurement.dims == ("alpha", "subset", "seed", "query")
    assert data.measurement.shape == (2, 10, 4, 8)
    assert data.lds.dims == ("method", "alpha", "query")
    assert data.method.values.tolist() == run.methods == ["graddot", "ekfac-heuristic", "ekfac-0.001", "ekfac-0.1"]
    for a, m in np.ndindex(2, 4):
        alone = lds(run.influence[m].to_numpy(), data.masks[a].to_numpy(), data.measurement[a].to_numpy())
        np.testing.assert_allclose(data.lds[m, a], alone, atol=1e-12)
        member = lds(run.member(1)[m].to_numpy(), data.masks[a].to_numpy(), data.measurement[a].to_numpy())
        np.testing.assert_allclose(data.member_lds[1, m, a], member, atol=1e-12)
    low, high = (data.interval[..., i].to_numpy() for i in (0, 1))
    reported = data.lds[:, :, ~data.tuning_query].mean("query").to_numpy()
    assert ((low < reported) & (reported < high)).all()
    for a in range(2):
        wanted, bounds = mean_ceiling(data.measurement[a].to_numpy()[..., ~data.tuning_query.to_numpy()])
        assert data.mean_ceiling[a].values.tolist() == pytest.approx([wanted, bounds.low, bounds.high])
        lds_, share = (data.league[0, a].sel(metric=name, statistic="estimate").item() for name in ("lds", "of_ceiling"))
        assert share == pytest.approx(lds_ / wanted)
    group = location.open_group(f"{run.url}/evaluation/{location.read_json(run.url + '/evaluation.json')['folder']}/results.zarr")
    schema.validate(group, sorted(group.array_keys()))


def test_dampings_are_chosen_on_queries_that_are_not_reported(done) -> None:
    data = done[1].evaluation
    np.testing.assert_array_equal(data.tuning_query, tuning(8, 0.5, 0))
    tuned = data.lds[:, :, data.tuning_query].mean(["query", "alpha"]).to_numpy()
    assert data.chosen.values.tolist() == [True, *(tuned[1:] == tuned[1:].max())]
    assert data.family.values.tolist() == ["graddot", "ekfac", "ekfac", "ekfac"]
    told = data.league.sel(metric="lds", statistic="estimate").to_numpy()
    np.testing.assert_allclose(told, data.lds[:, :, ~data.tuning_query].mean("query"))
    assert (data.seconds.to_numpy() > 0).all()


def test_the_other_metrics_are_there_with_their_intervals(done) -> None:
    league_ = done[1].evaluation.league
    for metric in ("leave_one_out", "mislabelled_auc", "retrieval", "harm", "randomised"):
        estimate, low, high = (league_.sel(metric=metric, statistic=name)[0, 0].item() for name in ("estimate", "low", "high"))
        assert low <= estimate <= high, metric
    data = done[1].evaluation
    assert data.curve.values.tolist() == [*data.attrs["chosen"], "at random"]
    assert data.harm.shape == (3, 2, 2)
    assert data.attrs["mislabelled"]["wrong"] == 6
    assert not data.tuning_query.sel(query=data.asked).any()


def test_the_table_in_the_terminal_has_the_best_first_and_one_row_per_sweep(done, capsys) -> None:
    data = done[1].evaluation
    head, *rows = league.league_rows(data, 0)
    assert head[:5] == ["method", "damping", "LDS", "of ceiling", "behind the best"]
    assert {row[0] for row in rows} == {"graddot", "ekfac"}
    assert float(rows[0][2].split()[0]) >= float(rows[1][2].split()[0])
    assert next(row for row in rows if row[0] == "ekfac")[1].endswith("(of 3)")
    league.print_league(data)
    printed = capsys.readouterr().out
    assert printed.count("LDS over 10 subsets of") == 2
    assert "mislabelled AUC" in printed


def test_the_page_is_one_file_that_asks_for_nothing(done) -> None:
    page = location.read_bytes(f"{done[0].url}/report.html").decode()
    assert page.startswith("<!doctype html>") or "<!doctype html>" in page[:40]
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for words in ("League table", "Damping", "Cost, and size of the subsets", "Checks", "Removing the most helpful examples"):
        assert words in page


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: install Debian's package of that name")
def test_the_page_fits_and_is_silent(done) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        for width in (390, 1280):
            tab = browser.new_page(viewport={"width": width, "height": 844})
            complaints, requests = [], []
            tab.on("console", lambda message, into=complaints: into.append(message.text))
            tab.on("request", lambda request, into=requests: into.append(request.url))
            tab.goto(f"{done[0].url}/report.html")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert complaints == []
            assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
            assert tab.locator(".forest .dot").count() == 4, "two alphas, two methods"
        browser.close()


def test_a_second_evaluation_computes_nothing_and_another_damping_retrains_nothing(done, config, store, cluster) -> None:
    again, run = evaluated(config, store, cluster)
    assert again.reused == ["run", "retraining", "evaluation"]
    assert (again.run_id, again.url) == (done[0].run_id, done[0].url)
    other, run = evaluated(config, store, cluster, "methods.1.damping=[1e-2]", "evaluation.removal=[]", "evaluation.randomised=false")
    assert "retraining" in other.reused
    assert other.run_id != done[0].run_id
    assert run.evaluation.method.values.tolist() == ["graddot", "ekfac-0.01"]
    np.testing.assert_array_equal(run.evaluation.lds[0], done[1].evaluation.lds[0])
    assert "harm" not in run.evaluation


def test_ridge_regression_is_known_exactly(tmp_path: Path, cluster: str) -> None:
    file = tmp_path / "ridge.toml"
    file.write_text(RIDGE)
    _, run = evaluated(file, f"file://{tmp_path}/store", cluster)
    data, problem = run.evaluation, tda.problem.load_problem("tda.problems.diabetes:RidgeDiabetes", {"queries": 12})
    (x, y), (q, _) = problem.train_data().tensors, problem.query_data().tensors
    x, q = (np.c_[part.numpy(), np.ones(len(part))] for part in (x, q))
    # Sherman and Morrison: (B - x x^T)^-1 for each example, B = X^T X + (N - 1) penalty I.
    penalty, moment = 0.1, x.T @ y.numpy()[:, 0]
    whole = np.linalg.solve(x.T @ x + 342 * penalty * np.eye(11), moment)
    inverse = np.linalg.inv(x.T @ x + 341 * penalty * np.eye(11))
    for row, i in enumerate(data.left_out.values):
        u = inverse @ x[i]
        left = (inverse + np.outer(u, u) / (1 - x[i] @ u)) @ (moment - x[i] * y.numpy()[i, 0])
        np.testing.assert_allclose(data.effect[row, 0], q @ (whole - left), atol=1e-6)
    assert data.lds.sel({"method": "ggn"}).min() > 0.97
    assert data.lds.sel({"method": "ggn"}).mean() > 0.99
    assert data.league.sel({"method": "ggn", "metric": "leave_one_out", "statistic": "estimate"}).min() > 0.9
    assert np.isnan(data.ceiling).all(), "one model per subset says nothing about the noise"
    assert any("one by one" in note for note in data.attrs["notes"])


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.soak)])
def test_killed_again_and_again_it_ends_with_the_same_table(config, done, tmp_path, cluster, capsys, kills) -> None:
    store, rng = tmp_path / "store", random.Random(1)  # noqa: S311
    whole, words = len(objects(done[0].store)), ("evaluate", str(config), "--store", str(store), "--set", cluster)
    for _ in range(kills):
        target = written(store) + rng.randrange(1, max(2, whole // kills))
        process = forked(tmp_path / "run.log", *words)
        try:
            wait_until(lambda target=target, process=process: written(store) >= target or process.poll() is not None, seconds=120)
        finally:
            process.kill()
            process.communicate()
    assert cli.status(list(words)) == 0
    out = capsys.readouterr().out
    assert "LDS over 10 subsets of 50% x 4 models" in out
    run = tda.open_run(f"file://{store}")
    assert table(f"{run.url}/evaluation/{run.evaluation.attrs['folder']}") == table(done[0].url)
    for name in ("measurement", "lds", "interval", "ceiling", "lds_draws", "harm", "effect"):
        np.testing.assert_array_equal(run.evaluation[name], done[1].evaluation[name])


@pytest.mark.parametrize(
    ("config_edit", "problem_edit", "words"),
    [
        (("alphas = [0.5, 0.7]", "alphas = [0.5, 1.0]"), None, "evaluation.alphas must be shares of the training set in (0, 1), got 1.0"),
        (("alphas = [0.5, 0.7]", "alphas = [0.0]"), None, "evaluation.alphas must be shares of the training set in (0, 1), got 0.0"),
        (("alphas = [0.5, 0.7]", "alphas = [0.5, 0.5]"), None, "evaluation.alphas = [0.5, 0.5] names a share twice"),
        (("alphas = [0.5, 0.7]", "alphas = [0.01]"), None, "alpha = 0.01 of 30 training examples leaves 0 in a subset"),
        (("subsets = 10", "subsets = 2"), None, "evaluation.subsets must be at least 3, got 2"),
        (("seeds = 4", "seeds = 0"), None, "evaluation.seeds must be at least 1, got 0"),
        (("seeds = 4", "seedss = 4"), None, 'unknown key "evaluation.seedss"; did you mean "seeds"?'),
        (("seeds = 4", "tuning_queries = 1.0"), None, "evaluation.tuning_queries must be below 1"),
        (("seeds = 4", "tuning_queries = 0.0"), None, "tuning_queries = 0 leaves nothing to choose a damping of 'ekfac' by"),
        (("leave_one_out = 5", "leave_one_out = 2"), None, "evaluation.leave_one_out must be at least 3 for a rank correlation"),
        (("leave_one_out = 5", "leave_one_out = 31"), None, "leave_one_out = 31 of 30 training examples: it must be from 3 to 30"),
        (("removal_queries = 2", "removal_queries = 5"), None, "removal_queries = 5, but of 8 queries 4 are reported; ask for"),
        (("ensemble = 2", "problem_options = {queries = 1}"), None, "tuning_queries = 0.5 of 1 queries"),
        (("damping = [", "damping = [-1.0, "), None, 'damping must be a finite number >= 0 or "heuristic", got -1.0'),
        (("damping = [", "damping = [] #"), None, "damping = [] names none; list different numbers"),
        (None, ("recipe=True", "recipe=False"), "has no fit method and the config no checkpoint; give one of them"),
        (None, ("np.arange(30) % 5 == 0", "np.arange(29) % 5 == 0"), "(29,)"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, prefect_api, config_edit, problem_edit, words
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = write_config(
        tmp_path / "config",
        CONFIG.replace(*config_edit) if config_edit else CONFIG,
        PROBLEM.replace(*problem_edit) if problem_edit else PROBLEM,
    )
    assert cli.status(["evaluate", str(file), "--store", str(tmp_path / "store")]) == cli.BAD_INPUT
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "store").exists()


def test_a_measurement_that_is_not_finite_after_retraining_is_named(tmp_path, cluster) -> None:
    trap = tmp_path / "trap"
    file = write_config(tmp_path / "config", CONFIG + f'[problem_options]\ntrap = "{trap}"\n', PROBLEM)
    attribute(file, f"file://{tmp_path}/store", cluster)
    trap.touch()  # the run is done, and is taken as it is: only retrained models fall into it
    with pytest.raises(InputError, match=r"the measurement of query 3 is nan after retraining on subset \d+ of alpha = 0\.[57]") as error:
        evaluated(file, f"file://{tmp_path}/store", cluster)
    assert "\n" not in str(error.value)
    assert "what is finished is kept in" in str(error.value)


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (InputError("the loss is nan"), True),
        (ShardFailed("score", 3, InputError("the loss is nan")), True),
        (ShardFailed("score", 3, OSError("the network is down")), False),
    ],
)
def test_the_untrained_model_is_left_out_for_good_only_where_it_cannot_be_scored(config, tmp_path, monkeypatch, error, kept) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(flow.attribute, "examine", lambda _: None)
    monkeypatch.setattr(flow.attribute, "attribute", fails)
    ready = SimpleNamespace(
        inputs=SimpleNamespace(problem="p", train="t"), request=SimpleNamespace(store=f"file://{tmp_path}"), client=None
    )
    notes: list[str] = []
    with nullcontext() if kept else pytest.raises(ShardFailed, match="the network is down"):
        assert flow._randomised(load_config(config), ready, None, [0], notes) is None
    assert [("the loss is nan" in note) for note in notes] == [True] * kept
    (weights,) = tmp_path.rglob("weights.safetensors")
    for member in (0, 1):
        torch.manual_seed(member)
        model = load_problem(load_config(config).problem, {}).model()
        assert checkpoint.digest(checkpoint.parse(weights.read_bytes(), "")) != checkpoint.digest(dict(model.state_dict()))


def test_a_fit_that_was_interrupted_has_no_price_and_another_has(tmp_path, monkeypatch) -> None:
    session = SimpleNamespace(spent=1.0)
    monkeypatch.setattr(stages, "here", lambda: session)
    told = []
    for tries in (1, 2):
        url = f"file://{tmp_path}/{tries}"
        for _ in range(tries):
            before = stages._begin(url)
        session.spent += 2.5
        stages._price(url, before)
        told.append(location.read_json(f"{url}/seconds.json")["compute"])
    assert told == [2.5, None]


def test_other_wrong_labels_are_another_evaluation(tmp_path) -> None:
    file = write_config(
        tmp_path, CONFIG, PROBLEM.replace("trap=''", "trap='', wrong=5").replace("% 5 == 0\n    def model", "% wrong == 0\n    def model")
    )
    marks = []
    for wrong in (5, 6, 5, 1):
        told = {"config": {"problem": load_config(file).problem, "problem_options": {"wrong": wrong}}}
        run = SimpleNamespace(id="run", url="file:///store/runs/run", manifest=told, influence=np.zeros((1, 1, 30)))
        marks.append(measuring.plan(run, "truth", "", ["graddot"], "{}").url)
    assert marks[0] == marks[2]
    assert len(set(marks)) == 3


def test_the_docs_describe_every_metric_and_key() -> None:
    from flows.config import EvaluationConfig
    from tasks.evaluate_results import METRICS

    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    for name in (*METRICS, *EvaluationConfig.model_fields):
        assert f"`{name}`" in text, name
