"""A study of the ladder from its file to its page, through Prefect and Dask; and what is wrong with the file, in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

import tda
from flows.decompose import decompose_study
from flows.study import load_study
from infra import storage
from tasks import decompose_measure, decompose_temporary, dense, layout
from tda import location, schema
from tda.errors import InputError
from tests.flows.runs import objects
from tests.tasks.test_decompose import WIDE

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "examples").glob("ladder-*.toml"))
CONFIG = """
problem = "tiny.py:Tiny"
memory_limit = "100kB"
[sweep]
width = [3, 40]
epochs = [1, 2]
[[inverses]]
pinv = 1e-4
[[inverses]]
damping = 1e-2
negative = "abs"
"""


def write(folder: Path, text: str = CONFIG) -> Path:
    (folder / "tiny.py").write_text(WIDE)
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file://{tmp_path_factory.mktemp('store')}/store"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def study(config: Path, store: str, cluster: str):
    return decompose_study(load_study(config, [cluster], store)), tda.open_study(store)


def test_a_study_leaves_results_manifest_and_page(study) -> None:
    summary, opened = study
    assert (summary.points, len(summary.refused), summary.reused) == (2, 2, 0)
    assert opened.id == summary.study_id
    assert opened.manifest["complete"]
    names = set(objects(summary.store))
    assert {f"studies/{opened.id}/{name}" for name in ("study.json", "report.html", "results.zarr/zarr.json")} <= names
    group = location.open_group(f"{opened.url}/results.zarr")
    schema.validate(group, sorted(group.array_keys()))
    assert not [name for name in names if "/partial/" in name or name.endswith(".partial")]


def test_its_numbers_are_finite_where_it_measured_and_nan_where_it_refused(study) -> None:
    results = study[1].results
    assert results.inverse.values.tolist() == ["pinv 0.0001", "damping 0.01, negative abs"]
    assert np.isfinite(results.error.sel(width=3, reference="hessian")).all()
    assert np.isnan(results.error.sel(width=40)).all()
    shares = results.error_share.sel(width=3, reference="hessian").sum("step")
    assert np.allclose(shares, 1)
    errors = results.matrix_error.sel(width=3, reference="block_ggn")
    assert (errors.sel(rung="ekfac") <= errors.sel(rung="kfac")).all()


def test_a_second_study_measures_nothing_again_and_another_inverse_decomposes_nothing_again(study, config, store, cluster) -> None:
    again = decompose_study(load_study(config, [cluster], store))
    assert again.reused == 2
    assert again.study_id != study[0].study_id
    other = decompose_study(load_study(config, [cluster, "inverses.0.pinv=1e-3"], store))
    assert other.reused == 0
    timings = tda.open_study(store, other.study_id).manifest["timings"]
    assert "measure" in timings
    assert not [name for name in timings if name.startswith(("matrix", "eigendecomposition"))]


def test_an_evaluated_study_has_the_lds_of_every_rung_and_measures_nothing_again(study, config, store, cluster) -> None:
    done = decompose_study(load_study(config, [cluster, "evaluation={alphas=[0.5], subsets=4, seeds=2}"], store))
    opened = tda.open_study(store, done.study_id)
    found = opened.results.rung_lds.sel(width=3, alpha=0.5)
    assert dict(found.sizes) == {"epochs": 2, "inverse": 2, "rung": 5, "query": 5}
    assert np.isfinite(found).all()
    assert not [name for name in opened.manifest["timings"] if name.startswith(("matrix", "eigendecomposition"))]
    html = location.read_bytes(f"{opened.url}/report.html").decode()
    for text in ("rank correlation over subsets", 'class="interval"', "ceiling</li>", "LDS falls with every step", "of 8 steps"):
        assert text in html


def test_an_interrupted_study_is_finished_by_the_same_command(config, cluster, tmp_path, monkeypatch) -> None:
    store = f"file://{tmp_path}/store"
    monkeypatch.setattr("tasks.decompose_page.write_page", stop)
    with pytest.raises(KeyboardInterrupt):
        decompose_study(load_study(config, [cluster, "keep_spectra=false"], store))
    with pytest.raises(InputError, match=r"no complete study 'latest' in .* \(1 there: "):
        tda.open_study(store)
    monkeypatch.undo()
    done = decompose_study(load_study(config, [cluster, "keep_spectra=false"], store))
    assert done.reused == 2
    assert location.list_names(f"{store}/studies") == [done.study_id]
    assert not location.list_names(f"{store}/artifacts/spectra"), "the eigenvectors are dropped once they are measured"


def spectra(store: str) -> set[str]:
    return {name for name in objects(store) if name.startswith("artifacts/spectra/")}


def test_a_study_drops_the_spectra_that_it_made_and_no_others(config, cluster, tmp_path) -> None:
    store = f"file://{tmp_path}/store"
    decompose_study(load_study(config, [cluster, "sweep.epochs=[1]"], store))
    kept = spectra(store)
    done = decompose_study(load_study(config, [cluster, "keep_spectra=false", "inverses.0.pinv=1e-3"], store))
    assert done.reused == 0
    assert kept
    assert spectra(store) == kept, "epochs = 1 was there before, epochs = 2 was made for this study"
    assert "temporary.json" not in location.list_names(done.url)


@pytest.mark.parametrize("again", ["keep_spectra=false", "keep_spectra=true"])
def test_a_point_that_was_measured_before_a_kill_is_dropped_by_the_next_try(config, cluster, tmp_path, monkeypatch, again) -> None:
    store = f"file://{tmp_path}/store"
    monkeypatch.setattr("flows.decompose.evaluate", stop)  # right after a wave was measured
    with pytest.raises(KeyboardInterrupt):
        decompose_study(load_study(config, [cluster, "keep_spectra=false"], store))
    measured = len(location.list_names(f"{store}/artifacts/decomposition"))
    assert measured
    made = spectra(store)
    assert made
    monkeypatch.undo()
    done = decompose_study(load_study(config, [cluster, again], store))
    assert done.reused == measured
    assert (spectra(store) >= made) == (again == "keep_spectra=true")
    assert bool(spectra(store)) == (again == "keep_spectra=true")
    assert "temporary.json" not in location.list_names(done.url)


def test_an_interrupted_deletion_leaves_nothing_that_looks_complete(tmp_path, monkeypatch) -> None:
    store = f"file://{tmp_path}/store"
    url = layout.artifact(store, "spectra", "abc")
    job = dense.DenseJob(url, None, "ggn", 1, 1)
    decompose_temporary.note(f"{store}/studies/s", [job, job])
    storage.write_json(f"{url}/complete.json", {})
    monkeypatch.setattr(storage, "delete_tree", stop)
    with pytest.raises(KeyboardInterrupt):
        decompose_temporary.drop(f"{store}/studies/s", store)
    assert not layout.is_complete(url)
    monkeypatch.undo()
    decompose_temporary.drop(f"{store}/studies/s", store, {url})
    assert location.list_names(f"{store}/artifacts/spectra") == ["abc"], "still needed"
    decompose_temporary.drop(f"{store}/studies/s", store)
    assert not spectra(store)


def test_an_unfinished_study_without_results_says_what_finishes_it(config, cluster, tmp_path, monkeypatch) -> None:
    store = f"file://{tmp_path}/store"
    monkeypatch.setattr("flows.decompose.train", stop)
    with pytest.raises(KeyboardInterrupt):
        decompose_study(load_study(config, [cluster], store))
    found = tda.open_study(store, incomplete=True)
    for name in ("points", "results"):
        with pytest.raises(InputError, match=f"study {found.id} has no results yet; the `tda decompose CONFIG` that began it"):
            getattr(found, name)
    location.open_group(f"{found.url}/results.zarr", "a")
    with pytest.raises(InputError, match="has no results yet"):
        _ = found.points  # its arrays were being written


def test_subsets_that_the_data_cannot_give_are_refused_before_anything_is_written(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"alpha = 0\.01 of 23 training examples leaves 0 in a subset.*\(with width 3, epochs 1\)"):
        decompose_study(load_study(config, ["evaluation={alphas=[0.01], subsets=4, seeds=2}"], f"file://{tmp_path}/store"))
    assert not (tmp_path / "store").exists()


def test_points_on_the_way_are_measured_once_and_told_with_their_step(config, cluster, tmp_path) -> None:
    text = ["sweep={width=[3]}", "progress=[0.52,0.53,1.0]"]
    done = decompose_study(load_study(config, [cluster, *text], f"file://{tmp_path}/store"))
    opened = tda.open_study(f"file://{tmp_path}/store")
    assert [point["step"] for point in opened.manifest["points"]] == [24, 24, None]
    assert opened.results.share.sel(width=3, progress=[0.52, 0.53, 1.0]).values.tolist() == pytest.approx([24 / 46, 24 / 46, 1.0])
    assert len(location.list_names(f"{done.store}/artifacts/decomposition")) == 2
    assert b"at step 24, 52.2 % of the training" in location.read_bytes(f"{opened.url}/report.html")


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_accepted(example: Path) -> None:
    config = load_study(example)
    assert config.sweep["epochs"] == [10, 100, 1000]
    assert config.model_validate(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("width = [3, 40]", "width = 3"), "sweep.width must be a list, got 3"),
        (("width = [3, 40]", "width = []"), "sweep.width must not be empty, got []"),
        (("width = [3, 40]", "width = [3, 3]"), "sweep.width = [3, 3] names a value twice; leave one of them out"),
        (("width = [3, 40]", "width = [3, 3.0]"), "sweep.width = [3, 3.0] names a value twice; leave one of them out"),
        (("epochs = [1, 2]", "progress = [1, 2]"), "sweep.progress: results call the share of the training so"),
        (
            ("[sweep]", "[problem_options]\nwidth = 2\n[sweep]"),
            "width is both in [problem_options] and in [sweep]",
        ),
        (("[sweep]", "[sweeps]"), 'unknown key "sweeps"; did you mean "sweep"?'),
        (("pinv = 1e-4", "pin = 1e-4"), 'unknown key "inverses.0.pin"; did you mean "pinv"?'),
        (("pinv = 1e-4", "pinv = -1"), "inverses.0: pinv must be a finite number > 0, the |eigenvalue| below which is left out, got -1"),
        (("damping = 1e-2", "damping = -1"), 'inverses.1: damping must be a finite number >= 0 or "heuristic", got -1'),
        (("pinv = 1e-4", "damping = 0.0"), "inverses.0: without damping or pinv rounding would be inverted"),
        (("pinv = 1e-4", 'damping = 1e-2\nnegative = "abs"'), 'two inverses are labelled "damping 0.01, negative abs"'),
        (('negative = "abs"', 'negative = "asb"'), 'inverses.1.negative must be "drop", "abs" or "keep", got "asb"; did you mean "abs"?'),
        (('"100kB"', '"lots"'), "memory_limit must be a number of bytes or a text such as \"8GiB\", got 'lots'"),
        (("[sweep]", "[evaluation]\nalphas = [1.0]\n[sweep]"), "evaluation.alphas must be different shares of the training examples"),
        (("[sweep]", "[evaluation]\nsubset = 9\n[sweep]"), 'unknown key "evaluation.subset"; did you mean "subsets"?'),
        (("[sweep]", "progress = [0.0]\n[sweep]"), "progress must be shares of the training, above 0 and up to 1, got 0.0"),
    ],
)
def test_a_study_is_refused_in_one_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = write(tmp_path, CONFIG.replace(*change))
    with pytest.raises(InputError) as caught:
        load_study(file)
    assert str(caught.value).startswith(f"{file}: {said}")
    assert "\n" not in str(caught.value)


def test_too_large_a_study_is_refused_before_anything_is_written(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every point of the sweep is too large"):
        decompose_study(load_study(config, ["memory_limit=100"], f"file://{tmp_path}/store"))
    assert not (tmp_path / "store").exists()


def test_the_definitions_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "decomposition.md").read_text()
    assert all(f"`{name}`" in text for name in (*decompose_measure.DEFINITIONS, "error", "error_share", "layer_error", "basis_overlap"))
