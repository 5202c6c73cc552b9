"""What README.md and docs/ show is true: their files run as they are written, their links lead somewhere, no key is left out."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.cli import status
from flows.config import ClusterConfig, RunConfig, load_config
from infra.settings import Settings
from tda.methods import METHODS
from tests.stored_run import write_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs" / "notebooks" / "first-look.ipynb"


def blocks(page, language):
    """The code blocks of a page in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which wine.py and wine.toml lie as in the README, and its run was made; what it said is in run.txt."""
    made = tmp_path_factory.mktemp("readme")
    (made / "wine.py").write_text(blocks(ROOT / "README.md", "python")[0])
    (made / "wine.toml").write_text(blocks(ROOT / "README.md", "toml")[0])
    command = [sys.executable, "-c", "from flows.cli import main; main()", *commands()[0]]
    done = subprocess.run(command, check=False, cwd=made, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (made / "run.txt").write_text(done.stdout)
    return made


def commands():
    """The arguments of each command that the README shows."""
    (console,) = blocks(ROOT / "README.md", "console")
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for line in console.splitlines()]
    assert all(program == "tda" for program, *_ in lines)
    return [arguments for _, *arguments in lines]


def test_the_readme_s_commands_run_as_they_are_written(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TDA_STORE", raising=False)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    said = {"run": (folder / "run.txt").read_text()}
    for arguments in commands()[1:]:
        assert status(arguments) == 0
        said[arguments[0]] = capsys.readouterr().out
    assert list(said) == ["run", "runs", "top", "show", "report"]
    assert "reused   nothing: all was computed" in said["run"]
    assert "wine.py:Wine" in said["runs"]
    assert len(re.findall(r"^ +[1-5] +\d+ +[012] +-\d", said["top"], re.MULTILINE)) == 5  # most helpful: scores below zero
    assert "(100.0%)" in said["show"]
    assert Path(said["report"].strip()).read_text().startswith("<!doctype html>")


def test_the_readme_s_notebook_lines_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(blocks(ROOT / "README.md", "python")[1], names)  # noqa: S102
    run = names["run"]
    assert run.influence.sizes == {"method": 1, "query": 89, "train": 89}
    assert run.influence.sel(method="ekfac", query=41).identical(run.influence.loc["ekfac", 41])
    assert run.influence.to_dataset(name="i").sel(method="ekfac").sizes["method"] == 1  # what the pages warn of: nothing was selected
    assert run.top(41, k=10, kind="harmful")["score"].is_monotonic_decreasing


def test_the_notebook_runs_on_a_run(tmp_path, monkeypatch):
    damping = {"ekfac": {"fc1": 1e-3, "fc2": 1e-3}}
    write_run(tmp_path / "store", config={"problem_options": {"queries": 12}}, damping=damping)
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs" / "notebooks")
    names, shown = {}, {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = ast.Expression(tree.body.pop().value)
            exec(compile(tree, cell["id"], "exec"), names)  # noqa: S102
            shown[cell["id"]] = eval(compile(last, cell["id"], "eval"), names)  # noqa: S307
    assert shown["influence"].dims == ("method", "query", "train")
    assert len(shown["top"]) == 5
    assert shown["pictures"].size == (11 * 6 * 10, 6 * 10)
    assert list(shown["spectra"].index) == ["fc1", "fc2"]


def test_the_notebook_is_a_valid_one_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | ({"outputs", "execution_count"} & set(cell))
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


def test_the_configuration_page_has_every_key_and_its_example_loads(tmp_path):
    page = ROOT / "docs" / "configuration.md"
    (example,) = blocks(page, "toml")
    file = tmp_path / "run.toml"
    file.write_text(example)
    config = load_config(file)
    stated = tomllib.loads(example)
    for key in ("seed", "dtype", "products", "modules", "exclude", "self_influence", "ensemble"):  # shown with their defaults
        assert stated[key] == RunConfig.model_fields[key].default
    assert config.cluster == ClusterConfig()
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("configuration.md", "methods.md", "bif.md", "multistage.md"))
    documented = set(re.findall(r"^\| `(\w+)` \|", pages, re.MULTILINE))
    options = {name for method in METHODS.values() for name in method.model_fields} - {"name"}
    settings = {f"TDA_{name.upper()}" for name in Settings.model_fields}
    assert documented >= {*RunConfig.model_fields, *ClusterConfig.model_fields, *METHODS, *options, *settings}
    for name in {*RunConfig.model_fields, *ClusterConfig.model_fields} - {"problem", "store", "methods", "cluster"}:
        assert re.search(rf"\b{name}\b", example), f"{name} is not in the example"


def test_links_lead_to_pages_and_headings_that_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            path, _, heading = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name}: {target}"
            assert not heading or heading in headings(found), f"{page.name}: {target}"


def headings(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_picture_of_the_report_is_small_and_wide():
    from PIL import Image

    picture = ROOT / "docs" / "report.png"
    assert picture.stat().st_size < 250_000
    with Image.open(picture) as image:
        assert 1100 <= image.width <= 1600
