"""Whole runs on a tiny problem, Prefect and Dask for real: complete, right, stated, the same bytes however they are run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tda
from flows.attribute import attribute_run, request_of
from flows.config import load_config
from infra.cluster import ClusterSpec
from tasks import plan as plans
from tasks import prepare
from tasks.subject import open_subject
from tda import checkpoint, location, schema
from tda.results import Run
from tests.flows.runs import CONFIG, PROBLEM, attribute, digests, objects, write_config
from tests.tda import pipeline

METHODS = ("graddot", "kfac", "ekfac")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file://{tmp_path_factory.mktemp('store')}/store"


@pytest.fixture(scope="module")
def run(config: Path, store: str, cluster: str) -> Run:
    return attribute(config, store, cluster)[1]


@pytest.fixture(scope="module")
def expected(config: Path, run: Run) -> pipeline.Outcome:
    """The same numbers in memory, at the checkpoint that the run trained: neither tasks nor storage take part."""
    plan = planned(config, run.store)
    opened = open_subject(plan.first.subject)
    tables = [dict(table) for table in load_config(config).methods]
    cuts = range(2, 23, 2)
    size = plan.first.scores.methods[0].directions.batch_size
    return pipeline.attribute(opened.attributed.problem, tables, batch_size=size, cuts=cuts, attributed=opened.attributed)


def planned(config: Path, store: str, *overrides: str) -> plans.Plan:
    request = request_of(load_config(config, overrides, store))
    return plans.plan(request, prepare.examine(request))


def relative(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_a_run_leaves_results_factors_manifest_and_report_and_nothing_half_done(run: Run) -> None:
    names = objects(run.store)
    for name in ("results.zarr/zarr.json", "run.json", "report.html"):
        assert f"runs/{run.id}/{name}" in names
    kinds = {name.split("/")[1] for name in names if name.startswith("artifacts/")}
    assert kinds == {"checkpoint", "factors", "directions"}
    for fingerprint in run.manifest["fingerprints"]["factors"].values():
        url = f"artifacts/factors/{fingerprint}"
        assert {f"{url}/complete.json", f"{url}/factors.zarr/zarr.json"} <= set(names)
        assert not [name for name in names if name.startswith(f"{url}/partial")], "partial sums are swept"
    assert not [name for name in names if name.endswith((".partial", ".pkl", ".pt"))]
    assert b"</html>" in names[f"runs/{run.id}/report.html"]


def test_every_stored_array_suits_the_schema(run: Run) -> None:
    results = location.open_group(f"{run.url}/results.zarr")
    schema.validate(results, sorted(results.array_keys()))
    assert set(results.array_keys()) == {
        "influence", "self_influence", "method", "query", "train", "query_label", "train_label", "query_measurement", "train_loss",
    }  # fmt: skip
    assert results["influence"].chunks == (1, 3, 2)
    for fingerprint in run.manifest["fingerprints"]["factors"].values():
        factors = location.open_group(f"{run.store}/artifacts/factors/{fingerprint}/factors.zarr")
        arrays = [name for name, found in factors.members(max_depth=None) if hasattr(found, "dtype")]
        schema.validate(factors, arrays)
        assert len(arrays) == 5 + 4 + 5, "two linear layers with two bases each, and the norm's scale and shift with one"


def test_a_run_equals_the_same_numbers_computed_in_memory(run: Run, expected: pipeline.Outcome) -> None:
    assert run.methods == list(METHODS)
    for m, method in enumerate(METHODS):
        assert relative(run.influence.loc[method], expected.influence[m]) < 1e-7, "but for the rounding to float32"
        assert relative(run.self_influence.loc[method], expected.self_influence[m]) < 1e-7
    for kind, factors in expected.factors.items():
        url = f"{run.store}/artifacts/factors/{run.manifest['fingerprints']['factors'][kind]}/factors.zarr"
        for layer, factor in enumerate(factors):
            group = location.open_group(url)[f"layers/{layer}"]
            for name in ("eigenvalues", "kfac_in", "kfac_out"):
                assert relative(group[name][...], getattr(factor, name)) < 1e-12


def test_losses_measurements_and_labels_stand_beside_the_scores(run: Run, config: Path) -> None:
    opened = open_subject(planned(config, run.store).first.subject)
    for data, stored, labels in ((opened.train, run.train_loss, "train_label"), (opened.query, run.query_measurement, "query_label")):
        x, y = torch.stack([data[i][0] for i in range(len(data))]), torch.stack([data[i][1] for i in range(len(data))])
        losses = torch.nn.functional.cross_entropy(opened.attributed.model(x), y, reduction="none")
        assert relative(stored, losses.detach()) < 1e-7
        assert run.influence[labels].values.tolist() == y.tolist()


def test_a_run_states_what_it_covers_did_and_means(run: Run) -> None:
    told = json.loads(objects(run.url)["run.json"])
    assert told["complete"] is True
    assert told["schema_version"] == schema.SCHEMA_VERSION
    assert told["shape"] == {"train": 23, "query": 5}
    assert told["coverage"]["share"] == 1.0
    assert told["coverage"]["attributed"] == told["coverage"]["parameters"] == 6 * 5 + 5 + 10 + 5 * 3 + 3
    assert told["coverage"]["skipped"] == []
    assert [layer["name"] for layer in told["coverage"]["layers"]] == ["0", "2", "3"]
    assert told["sign"] == schema.SIGN
    assert set(told["units"]) == set(METHODS)
    assert told["measurement"] == {"name": "loss", "better": "lower"}
    assert set(told["damping"]) == {"kfac", "ekfac"}
    assert set(told["damping"]["ekfac"].values()) == {0.01}
    assert all(value > 0 for value in told["damping"]["kfac"].values()), "the heuristic's value is told, not its name"
    assert told["seeds"] == {"run": 0, "fisher (sampled)": 0}
    assert {"tda", "python", "torch", "numpy", "zarr", "dask", "prefect"} <= set(told["versions"])
    marks = {"checkpoint", "train_data", "query_data", "problem", "factors", "spectra", "directions", "fits", "run"}
    assert marks == set(told["fingerprints"])
    assert told["config"]["shard_size"] == 2
    assert told["reused"] == {"checkpoint": False, "factors (sampled)": False, "factors (exact)": False, "directions": False}
    for stage in (
        "train",
        "covariances (exact)",
        "eigendecompositions (exact)",
        "eigenvalues (sampled)",
        "directions (ekfac)",
        "scores",
        "total",
    ):
        assert told["timings"][stage]["wall"] > 0
    for kind in ("wall", "compute"):
        rest = [timing[kind] for stage, timing in told["timings"].items() if stage != "total"]
        assert told["timings"]["total"][kind] >= sum(rest) - 1e-9, "also of the verification and the report"
    assert {"verify", "report"} < set(told["timings"])
    assert "one draw per example, seed 0" in told["noise"]["the Fisher's labels"]
    assert told["separable_errors"] == {}, "no method here allows it"
    for shares in told["layer_share"].values():
        assert sum(shares.values()) == pytest.approx(1.0)


def test_what_is_left_out_is_named_with_its_parameters(config: Path, store: str, cluster: str, run: Run) -> None:
    _, partial = attribute(config, store, cluster, 'exclude=["3"]')
    coverage = partial.manifest["coverage"]
    assert [(skipped["name"], skipped["parameters"]) for skipped in coverage["skipped"]] == [("3.weight", 15), ("3.bias", 3)]
    assert "exclude" in coverage["skipped"][0]["reason"]
    assert coverage["share"] == pytest.approx(1 - 18 / 63)


def test_what_was_not_sampled_and_what_was_approximated_is_stated(config: Path, store: str, cluster: str, run: Run) -> None:
    methods = 'methods=[{name="gradcos"}, {name="ekfac", fisher="exact", separable=1e-3}]'
    _, other = attribute(config, store, cluster, methods)
    assert other.manifest["noise"] == {}
    assert 0 <= other.manifest["separable_errors"]["ekfac"] <= 1e-3
    assert set(other.manifest["separable_errors"]) == {"ekfac"}
    assert "gradcos: a cosine; it ranks examples and predicts no change" in other.manifest["notes"]


def test_the_same_bytes_from_one_worker_from_two_and_when_repeated(
    config: Path, run: Run, cluster: str, single: str, tmp_path: Path
) -> None:
    for name, where in (("again", cluster), ("single", single)):
        assert digests(attribute(config, f"{tmp_path}/{name}", where)[1]) == digests(run), name


@pytest.mark.parametrize("sizes", [("shard_size=23", "batch_size=23"), ("shard_size=5", "batch_size=2"), ("shard_size=7", "query_block=1")])
def test_other_shards_batches_and_blocks_agree_to_the_last_digits(
    config: Path, store: str, run: Run, cluster: str, sizes: tuple[str, ...]
) -> None:
    _, other = attribute(config, store, cluster, *sizes)
    assert relative(other.influence, run.influence) < 2e-7, "float32 storage"
    for kind in ("sampled", "exact"):
        mine, theirs = (location.open_group(f"{r.store}/artifacts/factors/{r.manifest['fingerprints']['factors'][kind]}/factors.zarr")
                        for r in (other, run))  # fmt: skip
        assert mine.store_path != theirs.store_path
        for layer in range(3):
            for name in ("eigenvalues", "kfac_in", "kfac_out"):
                assert relative(mine[f"layers/{layer}/{name}"][...], theirs[f"layers/{layer}/{name}"][...]) < 1e-12


def test_a_second_run_reuses_everything_and_says_so(
    config: Path, store: str, run: Run, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = objects(f"{store}/artifacts")
    summary, second = attribute(config, store, cluster)
    assert summary.reused == ["checkpoint", "factors (sampled)", "factors (exact)", "directions"]
    assert "reused: checkpoint, factors (sampled), factors (exact), directions" in capsys.readouterr().err
    assert all(second.manifest["reused"].values())
    assert second.id != run.id
    assert digests(second) == digests(run)
    assert objects(f"{store}/artifacts") == before


def test_another_damping_makes_new_directions_and_refits_nothing(config: Path, store: str, run: Run, cluster: str) -> None:
    _, other = attribute(config, store, cluster, "methods.2.damping=0.1")
    assert other.manifest["reused"] == {"checkpoint": True, "factors (sampled)": True, "factors (exact)": True, "directions": False}
    assert other.manifest["fingerprints"]["factors"] == run.manifest["fingerprints"]["factors"]
    assert relative(other.influence.loc["kfac"], run.influence.loc["kfac"]) == 0
    assert relative(other.influence.loc["ekfac"], run.influence.loc["ekfac"]) > 1e-3


def test_another_seed_redraws_sampled_labels_and_leaves_the_exact_fisher(config: Path, store: str, run: Run, cluster: str) -> None:
    weights = f"{store}/artifacts/checkpoint/{next(iter(location.list_names(f'{store}/artifacts/checkpoint')))}/weights.safetensors"
    _, first = attribute(config, store, cluster, f"checkpoint={weights}")
    assert first.manifest["reused"] == {"factors (sampled)": True, "factors (exact)": True, "directions": True}, "the bytes count"
    _, other = attribute(config, store, cluster, f"checkpoint={weights}", "seed=1")
    assert other.manifest["reused"] == {"factors (sampled)": False, "factors (exact)": True, "directions": False}
    assert relative(other.influence.loc["kfac"], run.influence.loc["kfac"]) > 1e-3


def test_another_checkpoint_refits_even_at_the_same_place(config: Path, store: str, run: Run, cluster: str, tmp_path: Path) -> None:
    file, problem = tmp_path / "weights.safetensors", open_subject(planned(config, store).first.subject).attributed
    file.write_bytes(checkpoint.dump(problem.model))
    assert attribute(config, store, cluster, f"checkpoint={file}")[1].manifest["reused"]["factors (exact)"] is True
    with torch.no_grad():
        next(problem.model.parameters()).mul_(1.5)
    file.write_bytes(checkpoint.dump(problem.model))
    _, other = attribute(config, store, cluster, f"checkpoint={file}")  # the very workers that have opened the old one
    assert other.manifest["reused"] == {"factors (sampled)": False, "factors (exact)": False, "directions": False}
    x, y = problem.problem.query_data()[0]
    loss = torch.nn.functional.cross_entropy(problem.model(x), y).detach()
    assert float(other.query_measurement[0]) == pytest.approx(float(loss), rel=1e-6)


def test_an_edited_problem_is_another_problem(store: str, run: Run, cluster: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert all(attribute(config, store, cluster)[1].manifest["reused"].values()), "where the file lies does not matter"
    write_config(tmp_path, problem=PROBLEM.replace("nn.Tanh()", "nn.ReLU()"))
    _, other = attribute(config, store, cluster)
    assert not any(other.manifest["reused"].values())
    assert relative(other.influence, run.influence) > 1e-3


def test_digits_run_in_float32_and_bfloat16_products_name_their_precision(cluster: str, tmp_path: Path) -> None:
    text = (
        CONFIG.replace("tiny.py:Tiny", "tda.problems.digits:Digits")
        .replace("shard_size = 2", "shard_size = 500")
        .replace("query_block = 3", "")
    )
    config = write_config(tmp_path, text)
    small = ("problem_options={width=8, epochs=5, queries=20}",)
    _, full = attribute(config, f"{tmp_path}/store", cluster, *small)
    _, short = attribute(config, f"{tmp_path}/store", cluster, *small, 'products="bfloat16"')
    assert full.influence.shape == (3, 20, 1437)
    assert np.isfinite(full.influence.values).all()
    assert short.manifest["reused"]["checkpoint"] is True
    assert short.manifest["reused"]["factors (exact)"] is False
    ranks = [run.influence.loc["ekfac"].values.ravel().argsort().argsort() for run in (full, short)]
    assert np.corrcoef(*ranks)[0, 1] > 0.98
    page = objects(full.url)["report.html"].decode()
    assert "data:image" in page


def test_a_flow_that_a_schedule_starts_prepares_itself(config: Path, store: str, run: Run, cluster: str) -> None:
    from flows.attribute import attribute as flow

    found = flow(load_config(config, [cluster], store).model_dump(mode="json"))
    assert found.reused == ["checkpoint", "factors (sampled)", "factors (exact)", "directions"]


def test_a_local_cluster_is_as_good(config: Path, run: Run, prefect_api: None, tmp_path: Path) -> None:
    loaded = load_config(config, ["cluster.workers=1"], f"{tmp_path}/store")
    assert loaded.cluster.spec() == ClusterSpec("local", workers=1)
    summary = attribute_run(loaded)
    assert digests(tda.open_run(summary.store, summary.run_id)) == digests(run)
