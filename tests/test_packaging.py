"""What is shipped is what is there, in the versions that were tested."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed_for_the_build() -> None:
    tops = ("flows", "tasks", "tda", "infra")
    found = {".".join(file.parent.relative_to(ROOT).parts) for top in tops for file in (ROOT / top).rglob("__init__.py")}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_data_file_of_a_package_is_shipped() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for top in ("flows", "tasks", "tda", "infra"):
        for file in (ROOT / top).rglob("*"):
            if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts:
                folder = next(parent for parent in file.parents if (parent / "__init__.py").exists())
                package = ".".join(folder.relative_to(ROOT).parts)
                assert any(file.match(pattern) for pattern in patterns.get(package, [])), f"{file} is in no package-data"


def test_constraints_pin_every_requirement_within_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonical(name): number for name, _, number in (line.partition("==") for line in lines)}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonical(requirement.name)]), text
    assert "+" not in pinned["torch"], "a local version would shut out GPU wheels"


def test_what_is_installed_is_what_is_pinned() -> None:
    for name in ("torch", "zarr", "prefect", "fastapi", "sqlalchemy", "dask", "xarray"):
        pin = re.search(rf"(?mi)^{name}==(.+)$", (ROOT / "constraints.txt").read_text())
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            installed = "nothing"
        assert pin is not None
        assert installed == pin[1], f"{name}: run `make venv`"


def test_no_file_is_longer_than_four_hundred_lines() -> None:
    files = [file for top in ("flows", "tasks", "tda", "infra", "tests") for file in (ROOT / top).rglob("*.py")]
    assert {str(file.relative_to(ROOT)): n for file in files if (n := len(file.read_text().splitlines())) > 400} == {}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
