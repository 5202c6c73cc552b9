"""The page of a study in a real browser: it fits phones and desks, says nothing on the console and asks for nothing."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import decompose_results
from tasks.decompose import Point, Study
from tasks.decompose_page import page
from tasks.prepare import Inputs, Request
from tasks.subject import Subject
from tasks.tensors import write_tensors
from tda import schema, study

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's package of that name")]

HOSTILE = "<script>alert(1)</script>"
INVERSE = '{"damping": 0.0, "pinv": 0.0001, "relative": false, "negative": "drop"}'
LENGTHS = {"definition": 2, "inverse": 2, "reference": 3, "rung": 5, "step": 4, "top": 6, "quantile": 78, "split": 2}


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of random numbers, with a layer and an option that are hostile."""
    from tasks.decompose_measure import QUANTILES

    assert len(QUANTILES) == LENGTHS["quantile"]
    store = f"file://{tmp_path_factory.mktemp('page')}/store"
    asked = Study("x:Y", "{}", '{"name": ["a"]}', (1.0,), (("pinv 1e-4", INVERSE), ("damping", INVERSE)), store, 0, ("*",), (), 10**9, None)
    subject = Subject("x:Y", "{}", "", ("*",), (), "auto")
    request = Request(subject, store, 0, "full", (), None, None, None, self_influence=False)
    inputs = Inputs("p", "t", "q", 100, 10, None, None)
    layers = tuple(f"transformer.h.{i}.mlp.a_rather_long_name{HOSTILE if i == 0 else ''}" for i in range(3))
    points = [
        Point(f'{{"name": "{HOSTILE}", "depth": {d}, "epochs": {e}}}', 1.0, request, inputs, layers, (5, 6, 7), 1000, refused)
        for d in (1, 4)
        for e, refused in ((10, ""), (1000, "" if d == 1 else "takes 9 GiB, memory_limit is 8 GiB"))
    ]
    urls = [[] if point.refused else [_numbers(f"{store}/{i}", i)] for i, point in enumerate(points)]
    url = decompose_results.study_url(store, "s")
    manifest = decompose_results.manifest(asked, points, "s", "2026-11-22T02:00:00+00:00", {})
    manifest["timings"] = {"measure": {"wall": 3.0, "compute": 5.0}, "total": {"wall": 4.0, "compute": 5.0}}
    decompose_results.write_results(url, asked, points, urls)
    return page(study.Study(url, manifest)).decode()


def _numbers(url: str, seed: int) -> str:
    import torch

    random = np.random.default_rng(seed)
    lengths = LENGTHS | {"layer": 3, "other_layer": 3}
    written = {}
    for name, spec in schema.SPECS.items():
        if spec.dims[0] == "point" and spec.dtypes == ("float64",) and not name.startswith("rung_lds"):
            written[name] = torch.from_numpy(np.asarray(random.random([lengths[dim] for dim in spec.dims[1:]])))
    write_tensors(f"{url}/numbers.safetensors", written)
    return url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_is_silent(tmp_path: Path, browser: Any, html: str, width: int, scheme: str) -> None:
    (tmp_path / "report.html").write_text(html)
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab = context.new_page()
    complaints, requests = [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("text=the Kronecker steps carry about 60%").first.is_visible()
    shown, hidden = (tab.locator(f"#errors .of-{i}") for i in (0, 1))
    assert (shown.is_visible(), hidden.is_visible()) == (True, False)
    tab.locator('label[for="choose-1"]').click()
    assert (shown.is_visible(), hidden.is_visible()) == (False, True)
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    context.close()
