import json
import pickle

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from tda import location, schema
from tda.errors import InputError
from tda.results import NotStored, list_runs, open_run, ranking
from tests.stored_run import put, write_factors, write_run


@pytest.fixture
def s3_reads(monkeypatch):
    """The objects that were read from S3, as (path, bytes)."""
    from tda.s3 import PatientS3

    reads = []
    fetch = PatientS3._cat_file

    async def counted(self, path, *args, **kwargs):
        data = await fetch(self, path, *args, **kwargs)
        reads.append((path, len(data)))
        return data

    monkeypatch.setattr(PatientS3, "_cat_file", counted)
    return reads


@pytest.mark.parametrize("server", ["moto_s3", pytest.param("rgw_s3", marks=pytest.mark.s3)])
def test_a_slice_is_read_from_s3_without_the_rest(request, server, s3_reads):
    store = request.getfixturevalue(server)
    url = write_run(store, queries=64, train=20_000, chunks=(1, 4, 2_000))
    run = open_run(store)
    s3_reads.clear()
    row = run.influence.loc["ekfac", 17, 4_000:4_999]
    opened = sum(size for _, size in s3_reads)
    assert not [path for path, _ in s3_reads if "/influence/c/" in path]
    assert opened < 100_000
    values = row.to_numpy()
    chunks = [path.removeprefix(url.removeprefix("s3://")) for path, _ in s3_reads if "/influence/c/" in path]
    assert chunks == ["/results.zarr/influence/c/0/4/2"]
    whole = 2 * 64 * 20_000 * 4
    assert sum(size for _, size in s3_reads) < whole / 50
    np.testing.assert_array_equal(values, location.open_group(f"{url}/results.zarr")["influence"][0, 17, 4_000:5_000])


def test_opening_a_run_reads_its_manifest_only(moto_s3, s3_reads):
    write_run(moto_s3, "a")
    write_run(moto_s3, "b", created="2026-11-21T02:00:00+00:00")
    s3_reads.clear()
    open_run(moto_s3, "a")
    assert [path.rpartition("/")[2] for path, _ in s3_reads] == ["run.json"]


def test_a_sealed_run_opens_with_one_request_for_metadata(moto_s3, s3_reads):
    write_run(moto_s3, queries=4, train=8)
    run = open_run(moto_s3)
    s3_reads.clear()
    assert run.influence.shape == (2, 4, 8)
    assert [path.rpartition("results.zarr/")[2] for path, _ in s3_reads if path.endswith("zarr.json")] == ["zarr.json"]


def test_listing_runs_reads_no_array(moto_s3, s3_reads):
    for name in ("a", "b", "c"):
        write_run(moto_s3, name)
    s3_reads.clear()
    assert len(list_runs(moto_s3)) == 3
    assert sorted(path.rpartition("/runs/")[2] for path, _ in s3_reads) == ["a/run.json", "b/run.json", "c/run.json"]


def test_runs_are_listed_newest_first_with_what_tells_them_apart(tmp_path):
    write_run(tmp_path, "first", created="2026-11-20T02:00:00+00:00", reused={"checkpoint": True, "factors": True})
    write_run(tmp_path, "second", created="2026-11-21T02:00:00.250000+00:00", complete=False, methods=["kfac"])
    (tmp_path / "runs/interrupted").mkdir()
    table = list_runs(tmp_path)
    assert list(table["run"]) == ["second", "first"]
    assert list(table["complete"]) == [False, True]
    assert list(table["methods"]) == ["kfac", "ekfac, graddot"]
    assert list(table["reused"]) == ["checkpoint", "checkpoint, factors"]
    assert list(table["train"]) == [60, 60]
    assert table["created"][1] == pd.Timestamp("2026-11-20T02:00:00Z")


def test_a_store_without_runs_lists_none(tmp_path):
    table = list_runs(tmp_path / "absent")
    assert table.empty
    assert list(table.columns) == ["run", "created", "complete", "problem", "methods", "train", "query", "reused"]


def test_latest_is_the_newest_complete_run(tmp_path):
    write_run(tmp_path, "z", created="2026-11-19T02:00:00+00:00")
    write_run(tmp_path, "a", created="2026-11-20T02:00:00+00:00")
    write_run(tmp_path, "b", created="2026-11-21T02:00:00+00:00", complete=False)
    assert open_run(tmp_path).id == "a"
    assert open_run(tmp_path, incomplete=True).id == "b"


def test_a_run_opens_by_a_beginning_of_its_id_that_no_other_shares(tmp_path):
    for name in ("digits-1", "digits-12", "cifar-1"):
        write_run(tmp_path, name)
    assert open_run(tmp_path, "ci").id == "cifar-1"
    assert open_run(tmp_path, "digits-1").id == "digits-1"
    with pytest.raises(InputError, match=r"could be any of 2: digits-1, digits-12"):
        open_run(tmp_path, "dig")
    with pytest.raises(InputError, match="no run 'mnist'"):
        open_run(tmp_path, "mnist")
    with pytest.raises(InputError, match=r"no run '\.\./\.\.'"):
        open_run(tmp_path, "../..")


def test_an_incomplete_run_opens_only_on_request(tmp_path):
    write_run(tmp_path, "half", complete=False)
    with pytest.raises(InputError, match=r"half .*incomplete; run the same config again"):
        open_run(tmp_path, "half")
    with pytest.raises(InputError, match=r"no complete run .* \(1 incomplete\)"):
        open_run(tmp_path)
    assert open_run(tmp_path, "half", incomplete=True).influence.shape == (2, 12, 60)


def test_a_run_of_a_newer_schema_is_refused(tmp_path):
    write_run(tmp_path, schema_version=schema.SCHEMA_VERSION + 1)
    with pytest.raises(InputError, match="upgrade tda"):
        open_run(tmp_path)


def test_scores_are_labelled_and_say_what_they_mean(tmp_path):
    run = open_run(write_run(tmp_path).partition("/runs/")[0])
    assert run.influence.dims == ("method", "query", "train")
    assert run.influence.dtype == np.float32
    assert run.self_influence.dims == ("method", "train")
    assert set(run.influence.coords) == {"method", "query", "train", "query_label", "train_label"}
    assert run.influence.attrs["sign"] == schema.SIGN
    assert run.influence.attrs["units"] == {"ekfac": schema.UNITS, "graddot": schema.UNITS}
    assert run.influence.attrs["damping"]["ekfac"]["fc1"] == 1e-3
    assert run.influence.sel({"method": "graddot"}).shape == (12, 60)
    assert run.train_loss.shape == (60,)
    assert run.query_measurement.shape == (12,)
    assert repr(run).startswith("<Run 2026-11-22-0200-digits (complete) of tda.problems.digits:Digits: ekfac, graddot; 12 queries x 60")


def test_labels_are_absent_where_they_are_not_integers(tmp_path):
    write_run(tmp_path, labels=False)
    run = open_run(tmp_path)
    assert set(run.influence.coords) == {"method", "query", "train"}
    assert list(run.top(0, 2).columns) == ["rank", "train", "score"]


def test_an_unsealed_run_reads_the_same(tmp_path):
    write_run(tmp_path / "a", sealed=False)
    write_run(tmp_path / "b")
    np.testing.assert_array_equal(open_run(tmp_path / "a").influence, open_run(tmp_path / "b").influence)


@pytest.mark.parametrize(("better", "helpful_sign"), [("lower", -1), ("higher", 1)])
def test_helpful_examples_move_the_measurement_in_its_better_direction(tmp_path, better, helpful_sign):
    write_run(tmp_path, better=better)
    run = open_run(tmp_path)
    scores = run.influence.loc["graddot", 3].to_numpy()
    helpful = run.top(3, 5, "graddot", "helpful")
    harmful = run.top(3, 5, "graddot", "harmful")
    assert list(helpful["train"]) == list(np.argsort(-helpful_sign * scores)[:5])
    assert list(harmful["train"]) == list(np.argsort(helpful_sign * scores)[:5])
    np.testing.assert_array_equal(helpful["score"], scores[helpful["train"]])
    np.testing.assert_array_equal(helpful["label"], helpful["train"] % 10)
    assert list(helpful["rank"]) == [1, 2, 3, 4, 5]


def test_top_takes_the_last_method_and_stops_at_the_number_of_examples(tmp_path):
    write_run(tmp_path, train=3)
    run = open_run(tmp_path)
    assert len(run.top(0, 10)) == 3
    assert run.default_method == "graddot"
    pd.testing.assert_frame_equal(run.top(0, 2), run.top(0, 2, "graddot"))


def test_sel_by_method_selects_the_method_alone_and_with_others(tmp_path):
    write_run(tmp_path)
    run = open_run(tmp_path)
    whole = run.influence.to_numpy()
    np.testing.assert_array_equal(run.influence.sel(method="graddot"), whole[1])
    np.testing.assert_array_equal(run.influence.sel(method="graddot", query=3, train=[5, 4]), whole[1, 3, [5, 4]])
    np.testing.assert_array_equal(run.influence.sel({"query": 3}, method="ekfac"), whole[0, 3])
    np.testing.assert_array_equal(run.influence.sel(query=3).sel(method="ekfac"), whole[0, 3])
    np.testing.assert_array_equal(run.influence.sel(method="ekfac").sel(method="ekfac", query=1), whole[0, 1])
    np.testing.assert_array_equal(run.self_influence.sel(method="graddot"), run.self_influence.to_numpy()[1])
    assert run.influence.sel(query=[3.2], method="nearest")["query"].item() == 3
    with pytest.raises(InputError, match="no method 'ekfak' here; there is ekfac, graddot"):
        run.influence.sel(method="ekfak")


def test_scores_do_what_arrays_do(tmp_path):
    write_run(tmp_path)
    scores = open_run(tmp_path).influence
    assert not scores.variable._in_memory, "nothing was fetched"
    assert scores.attrs["sign"] == schema.SIGN
    assert "ekfac" in repr(scores)
    assert "<div" in scores._repr_html_()
    np.testing.assert_array_equal(2 * scores - scores, scores)
    assert scores.isel(train=0).mean("query").shape == (2,)
    assert scores.to_dataframe(name="score").shape[0] == scores.size
    assert scores.groupby("train_label").sum().sizes["train_label"] == 10
    assert np.abs(scores).max() == np.abs(scores.to_numpy()).max()
    assert xr.concat([scores, scores], "again").sizes["again"] == 2
    assert pickle.loads(pickle.dumps(scores.load())).equals(scores)  # noqa: S301  (our own)


def test_ranking_leaves_out_what_was_not_computed_and_breaks_ties_by_position():
    scores = np.array([1.0, np.nan, -2.0, 1.0, -2.0])
    assert list(ranking(scores, kind="helpful", better="lower")) == [2, 4, 0, 3]
    assert list(ranking(scores, kind="harmful", better="lower")) == [0, 3, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"query": 99}, "no query 99; it has 12, from 0 to 11"),
        ({"query": 0, "method": "tracin"}, "no method 'tracin'; it has ekfac, graddot"),
        ({"query": 0, "kind": "useful"}, "kind must be 'helpful' or 'harmful', got 'useful'"),
        ({"query": 0, "k": 0}, "k must be at least 1, got 0"),
    ],
)
def test_a_wrong_question_is_answered_in_one_line(tmp_path, arguments, complaint):
    write_run(tmp_path)
    with pytest.raises(InputError, match=complaint):
        open_run(tmp_path).top(**arguments)


def test_what_no_method_stored_says_which_would(tmp_path):
    write_run(tmp_path)
    run = open_run(tmp_path)
    for name in ("stderr", "trajectories", "evaluation"):
        with pytest.raises(NotStored, match=f"has no {name}"):
            getattr(run, name)
        assert not hasattr(run, name)


def test_factors_are_spectra_by_layer(tmp_path):
    write_run(tmp_path)
    factors = open_run(tmp_path).factors
    assert factors["fc1.eigenvalues"].shape == (1, 16, 65)
    assert factors["fc2.kfac_in"].shape == (1, 17)
    assert factors["fc2.kfac_in"].attrs["kind"] == "Linear"
    assert not [name for name in factors if str(name).startswith("norm")]
    np.testing.assert_array_equal(factors["fc2.eigenvalues"], np.full((1, 10, 17), 2.0))


def test_two_fits_in_one_run_stay_apart(tmp_path):
    write_factors(tmp_path, "f2", {"fc1": (16, 65)})
    write_run(tmp_path, fingerprints={"factors": {"sampled": "f1", "empirical": "f2"}})
    assert {"sampled/fc1.eigenvalues", "empirical/fc1.eigenvalues"} <= set(open_run(tmp_path).factors)


def test_absent_factors_are_explained(tmp_path):
    write_run(tmp_path, "none", fingerprints={})
    with pytest.raises(NotStored, match="methods such as ekfac"):
        _ = open_run(tmp_path, "none").factors
    write_run(tmp_path, "gone", fingerprints={"factors": {"ekfac": "swept"}})
    with pytest.raises(InputError, match=r"are gone from .*swept"):
        _ = open_run(tmp_path, "gone").factors


def test_a_run_whose_arrays_are_gone_says_so(tmp_path):
    put(f"file://{tmp_path}/runs/x/run.json", json.dumps({"schema_version": 1, "complete": True}).encode())
    with pytest.raises(InputError, match=r"has no results\.zarr"):
        _ = open_run(tmp_path, "x").influence


@pytest.mark.parametrize("damaged", [b'{"schema', b"", b"[1]", b"\xff\xfe"])
def test_a_damaged_manifest_is_told_and_hides_no_other_run(tmp_path, damaged):
    put(f"file://{tmp_path}/runs/x/run.json", damaged)
    with pytest.raises(InputError, match=r"no complete run in .* \(1 incomplete, run.json of x is damaged\)"):
        open_run(tmp_path)
    with pytest.raises(InputError, match=r"is not JSON|not an object"):
        open_run(tmp_path, "x", incomplete=True)
    write_run(tmp_path, "good")
    assert open_run(tmp_path).id == open_run(tmp_path, incomplete=True).id == "good"
    table = list_runs(tmp_path).set_index("run")
    assert (bool(table["complete"]["x"]), table["problem"]["x"]) == (False, "run.json is damaged")
    assert table["complete"]["good"]


def test_an_array_of_foreign_shape_is_refused(tmp_path):
    url = write_run(tmp_path, sealed=False)
    group = location.open_group(f"{url}/results.zarr", "r+")
    del group["train_loss"]
    schema.create_array(group, "train_loss", (7,))
    with pytest.raises(InputError, match="along 'train'"):
        _ = open_run(tmp_path).influence
