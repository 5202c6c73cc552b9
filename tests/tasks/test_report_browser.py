"""The report in a real browser: Debian's chromium, driven by playwright."""

import shutil

import numpy as np
import pytest

from tests.stored_run import SKIPPED
from tests.tasks.report_samples import DESCRIPTIONS, HOSTILE, hostile, page_of

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's package of that name")]


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a page in a fresh browser tab; it records what the page complains about and what it asks for."""
    contexts = []

    def open_page(html, width=1280, **options):
        file = tmp_path / "report.html"
        file.write_text(html)
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}, **options))
        tab = contexts[-1].new_page()
        tab.complaints, tab.requests = [], []
        tab.on("console", lambda message: tab.complaints.append(message.text))
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on("dialog", lambda dialog: tab.complaints.append(dialog.message))
        tab.on("request", lambda request: tab.requests.append(request.url))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", sorted(DESCRIPTIONS))
def test_the_page_fits_and_is_silent(tmp_path, opened, kind, width, scheme):
    names = [f"transformer.h.{i}.attn.a_rather_long_name_that_must_wrap.c_attn" for i in range(4)]
    layers = [
        {"name": name, "kind": "Conv1D", "parameters": 197376, "shape": [768, 257], "positions": 128, "structure": "kronecker"}
        for name in names
    ]
    coverage = {"parameters": 10**9, "attributed": 10**8, "share": 0.1, "layers": layers, "skipped": [SKIPPED]}
    methods = ["ekfac", "kfac", "graddot", "gradcos", "a-method-with-quite-a-long-label"]
    html = page_of(
        tmp_path, DESCRIPTIONS[kind], coverage=coverage, methods=methods, fingerprints={"run": "f" * 64, "factors": {"sampled": "e" * 64}}
    )
    tab = opened(html, width, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert all(tab.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)"))


def test_hostile_text_is_shown_as_text(tmp_path, opened):
    tab = opened(page_of(tmp_path, hostile, problem=f"x:{HOSTILE}"))
    assert tab.title() == "2026-11-22-0200-digits · training data attribution"
    assert HOSTILE in tab.locator(".tile .text").first.inner_text()
    assert tab.locator("h1").is_visible()
    assert tab.complaints == []


def test_even_unescaped_content_could_not_run_or_load(tmp_path, opened):
    html = page_of(tmp_path).replace("<h1>", f"<h1>{HOSTILE}", 1)
    tab = opened(html)
    assert tab.title().startswith("2026-11-22-0200-digits")
    assert tab.locator("body").evaluate("b => getComputedStyle(b).display") == "block"
    assert len([line for line in tab.complaints if "Content Security Policy" in line]) >= 3


@pytest.mark.parametrize("javascript", [True, False])
def test_the_chooser_shows_one_method_at_a_time_even_without_scripts(tmp_path, opened, javascript):
    tab = opened(page_of(tmp_path), java_script_enabled=javascript)

    def shown():
        return {place for place in (0, 1) if tab.locator(f"#queries .of-{place}").first.is_visible()}

    assert shown() == {1}, "the last of the configuration"
    tab.get_by_text("ekfac", exact=True).first.click()
    assert shown() == {0}
    tab.keyboard.press("ArrowRight")
    assert shown() == {1}


def test_tiny_pictures_are_enlarged_without_blur(tmp_path, opened):
    picture = opened(page_of(tmp_path)).locator(".query img").first
    assert picture.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"
    assert picture.bounding_box()["width"] >= 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(tmp_path, opened, scheme):
    tab = opened(page_of(tmp_path), color_scheme=scheme)
    colours = tab.evaluate(
        "(names => { const s = getComputedStyle(document.documentElement); return names.map(n => s.getPropertyValue('--' + n).trim()) })"
        "(['ground', 'card', 'ink', 'muted', 'helpful', 'harmful', 'accent'])"
    )
    grounds, inks = colours[:2], colours[2:]
    assert min(contrast(ink, ground) for ink in inks for ground in grounds) >= 4.5


def contrast(one, other):
    """The contrast ratio of two colours by WCAG 2."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
