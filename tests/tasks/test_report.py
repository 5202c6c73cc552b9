import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks import report
from tasks.report import write_report
from tasks.report_charts import histogram
from tasks.report_content import LONGEST_SIDE, LONGEST_TEXT, content, described
from tasks.report_text import date, number, percent, seconds
from tda import location
from tda.results import open_run
from tests.stored_run import SKIPPED, write_run
from tests.tasks.report_samples import HOSTILE, Shown, hostile, images, page_of, tables

MINUS = "\N{MINUS SIGN}"


@pytest.fixture
def run(tmp_path):
    return open_run(location.resolve(write_run(tmp_path).partition("/runs/")[0]))


def test_the_page_holds_what_a_run_must_state(run):
    page = write_report(run, Shown(images)).decode()
    assert SKIPPED["name"] in page
    assert SKIPPED["reason"].replace("'", "&#39;") in page
    assert "23.3 %" in page  # the share of parameters attributed
    for fact in ("fisher_labels", "2.13.0", "c0ffee", "products in float32", "one label drawn per training example", "computed now"):
        assert fact in page
    assert "d f_q / d eps_i" in page
    assert "nats" in page
    assert "22 November 2026, 02:00 UTC" in page
    assert 'data-name="damping">0.001<' in page
    assert "62 %" in page  # the share of layer fc1
    assert "14.2 s" in page  # the whole run's time, not the sum of its stages


def test_a_page_is_filled_into_the_templates_that_its_code_came_with(run, monkeypatch):
    """Chains take minutes, and the package may be upgraded meanwhile: a newer template asks for what older code does not give."""
    real = Path.open

    def replaced(path, *args, **options):
        assert path.suffix != ".j2", "read again while the process runs"
        return real(path, *args, **options)

    def gone(loader, environment, name):
        raise AssertionError(f"{name} is read again while the process runs")

    monkeypatch.setattr(Path, "open", replaced)
    monkeypatch.setattr("jinja2.FileSystemLoader.get_source", gone)
    assert "Distribution of scores" in write_report(run, Shown(images)).decode()


def test_the_page_opens_on_the_last_method_of_the_configuration(tmp_path):
    page = page_of(tmp_path, methods=("graddot", "kfac", "ekfac"))
    assert re.findall(r'aria-label="Show (\w+)" checked', page) == ["ekfac"]


def test_a_cosine_is_not_called_a_change_and_a_separable_form_states_its_error(tmp_path):
    page = page_of(tmp_path, methods=("gradcos", "ekfac"), separable_errors={"ekfac": 4.2e-4})
    first, second = page.split('<p class="lead of of-')[1:3]
    assert "they rank examples, and predict no change" in first
    assert "separable" not in first
    assert "they rank" not in second.partition("</p>")[0]
    assert "Directions in separable form: relative error of the scores 0.00042" in second


def test_the_page_is_the_same_bytes_for_the_same_run(run):
    assert write_report(run, Shown(images)) == write_report(run, Shown(images))


def test_queries_with_the_worst_measurement_come_first(tmp_path):
    for better, worst in (("lower", np.argmax), ("higher", np.argmin)):
        page = page_of(tmp_path, better=better, queries=1)
        values = open_run(tmp_path).query_measurement.to_numpy()
        assert re.findall(r'id="query-(\d+)"', page) == [str(worst(values))]


def test_each_query_stands_beside_its_top_examples_by_every_method(tmp_path):
    page = page_of(tmp_path, queries=1, k=3)
    run = open_run(tmp_path)
    query = int(re.search(r'id="query-(\d+)"', page)[1])
    card = page.partition("<article")[2].partition("</article>")[0]
    shown = [int(i) for i in re.findall(r"#(\d+)</span>", card)]
    expected = [i for method in run.methods for kind in ("helpful", "harmful") for i in run.top(query, 3, method, kind)["train"]]
    assert shown == expected


def test_helpful_means_raising_a_measurement_that_is_better_higher(tmp_path):
    page = page_of(tmp_path, better="higher")
    assert 'Helpful <span class="muted">raise the margin' in page
    assert "(scores above zero)" in page


def test_nothing_in_the_page_leads_outside(run):
    page = write_report(run, Shown(images)).decode()
    assert "<script" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert not re.search(r"""(?:src|href|action)\s*=\s*["'](?!data:|#)""", page)
    assert "url(" not in page
    assert "@import" not in page


def test_hostile_content_is_escaped_wherever_it_stands(tmp_path):
    layer = {"name": HOSTILE, "kind": HOSTILE, "parameters": 1, "shape": [1], "positions": 1, "structure": HOSTILE}
    page = page_of(
        tmp_path,
        hostile,
        methods=[HOSTILE],
        problem=f"x:{HOSTILE}",
        created=HOSTILE,
        notes=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        config={HOSTILE: HOSTILE},
        reused={HOSTILE: True},
        noise={HOSTILE: HOSTILE},
        coverage={
            "parameters": 2,
            "attributed": 1,
            "share": 0.5,
            "layers": [layer],
            "skipped": [dict.fromkeys(("name", "reason"), HOSTILE) | {"parameters": 1}],
        },
    )
    assert "<script" not in page
    assert "<base" not in page
    assert "onerror=&#34;" in page
    assert "{{ 7 * 7 }}" in page
    assert page.count("<style>") == page.count("</style>") == 1


def test_a_broken_describe_does_not_cost_the_report(run):
    def broken(split, i):
        raise RuntimeError(f"no picture of {split} {i}")

    page = write_report(run, Shown(broken)).decode()
    assert "cannot be shown: RuntimeError: no picture of train" in page


def test_each_example_is_described_once(run):
    asked = []

    def describe(split, i):
        asked.append((split, i))
        return "x"

    write_report(run, Shown(describe))
    assert len(asked) == len(set(asked))


def test_a_run_with_little_in_it_still_has_a_report(tmp_path):
    keys = ("config", "versions", "seeds", "coverage", "damping", "reused", "layer_share", "timings", "noise", "fingerprints")
    empty = {key: {} for key in keys}
    page = page_of(tmp_path, labels=False, queries=99, k=99, notes=[], train=3, **empty, complete=False)
    assert "This run is incomplete" in page
    assert "All queries" in page


def test_scores_that_are_missing_are_left_out(tmp_path):
    url = write_run(tmp_path, complete=False)
    group = location.open_group(f"{url}/results.zarr", "r+")
    group["influence"][:] = np.nan
    group["self_influence"][:] = np.nan
    page = write_report(open_run(tmp_path, incomplete=True), Shown(images)).decode()
    assert "No scores are stored for this query" in page
    assert "Not stored in this run" in page


def test_the_histogram_of_a_large_run_draws_some_queries_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_SCORES", 60 * 5)
    page = page_of(tmp_path)
    assert "Drawn from 5 evenly spaced queries" in page
    assert "Histogram of 300 values" in page


@pytest.mark.parametrize(
    ("value", "size", "mode"),
    [
        (np.zeros((5, 7)), (7, 5), "L"),
        (np.zeros((1, 5, 7)), (7, 5), "L"),
        (np.zeros((5, 7, 1)), (7, 5), "L"),
        (np.zeros((3, 5, 7)), (7, 5), "RGB"),
        (np.zeros((5, 7, 3), dtype=np.uint8), (7, 5), "RGB"),
        (np.zeros((4, 5, 7)), (7, 5), "RGBA"),
        (torch.zeros(3, 5, 7, dtype=torch.bfloat16, requires_grad=True), (7, 5), "RGB"),
        (np.zeros((5, 7), dtype=bool), (7, 5), "L"),
        (np.zeros((400, 1000)), (LONGEST_SIDE, 77), "L"),
        (Image.new("P", (7, 5)), (7, 5), "RGB"),
        (Image.new("1", (7, 5)), (7, 5), "L"),
    ],
)
def test_arrays_and_images_of_every_layout_become_pictures(value, size, mode):
    picture = decoded(content(value))
    assert picture.size == size
    assert picture.mode == mode


def decoded(shown):
    assert shown.uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2])))


def test_bytes_stay_and_floats_are_scaled_by_their_range():
    levels = np.array([[0, 10], [20, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(decoded(content(levels)), levels)
    np.testing.assert_array_equal(decoded(content(np.array([[0.0, 0.2], [0.4, 0.4]]))), [[0, 51], [102, 102]])
    np.testing.assert_array_equal(decoded(content(np.array([[-1.0, 0.0], [1.0, np.nan]]))), [[0, 128], [255, 128]])
    np.testing.assert_array_equal(decoded(content(np.full((2, 2), 7.0))), np.zeros((2, 2)))


def test_tiny_pictures_keep_their_pixels_visible():
    assert content(np.zeros((8, 8))).pixelated
    assert not content(np.zeros((224, 224))).pixelated


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("", "(empty)"),
        (3.5, "3.5"),
        (None, "None"),
        ([1, 2, 3], "1, 2, 3 (3)"),
        (torch.arange(20), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … (20)"),
        (np.float32(0.1), "0.1"),
        ([[1, 2], [3]], "[[1, 2], [3]]"),
    ],
)
def test_what_is_no_picture_is_text(value, text):
    assert content(value).text == text


def test_long_texts_are_cut_and_say_by_how_much():
    shown = content("x" * (LONGEST_TEXT + 7))
    assert len(shown.text) == LONGEST_TEXT
    assert shown.omitted == 7


def test_fields_are_shown_by_name():
    shown = described(Shown(tables), "train", 3)
    assert [name for name, _ in shown.fields] == ["age", "name", "picture"]
    assert shown.fields[2][1].uri


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=40))
def test_a_histogram_counts_every_finite_value_once_and_splits_at_zero(values):
    finite = [v for v in values if np.isfinite(v)]
    found = histogram(np.array(values))
    if not finite:
        assert found is None
        return
    assert sum(bar.count for bar in found.bars) == found.count == len(finite)
    assert all(bar.low >= 0 or bar.high <= 0 for bar in found.bars)
    assert sum(bar.count for bar in found.bars if bar.negative) <= sum(v <= 0 for v in finite)
    assert all(found.left - 0.1 <= bar.x and bar.x + bar.width <= found.right + 0.7 for bar in found.bars)


def test_numbers_shares_durations_and_dates_read_well():
    shown = [number(v) for v in (0.0, -0.01234, 1234567.0, -1e-7, 12345, float("nan"))]
    assert shown == ["0", f"{MINUS}0.0123", "1.23e6", f"{MINUS}1.00e{MINUS}7", "12,345", "\N{EN DASH}"]
    assert number(1.6, padded=True) == "1.60"
    assert number(123.0, padded=True) == "123"
    assert [percent(v) for v in (0, 1e-5, 0.5, 0.99999, 1)] == ["0 %", "< 0.1 %", "50 %", "> 99.9 %", "100 %"]
    assert [seconds(v) for v in (0.012, 3.21, 100, 4000)] == ["12 ms", "3.2 s", "1 min 40 s", "1 h 6 min"]
    assert date("2026-11-22T03:00:00+01:00") == "22 November 2026, 02:00 UTC"
    assert date("yesterday") == "yesterday"
