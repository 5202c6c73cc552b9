"""A problem is found by its name, and what is wrong with it is said in one line."""

import ast
import importlib
import pickle
import sys

import pytest
import torch

from tda import InputError, Problem
from tda.problem import can_fit, load_problem, measurement_of, problem_digest
from tda.problems.digits import Digits
from tda.sources import sources

GOOD = """
import torch
import tda

class Mine(tda.Problem):
    likelihood = tda.Categorical()

    def __init__(self, width=3):
        self.width = width

    def model(self):
        return torch.nn.Linear(2, self.width)

    def train_data(self):
        return [(torch.zeros(2), 0)]

    def query_data(self):
        return [(torch.ones(2), 1)]
"""


@pytest.fixture
def write(tmp_path):
    def to(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    before = set(sys.modules)
    yield to
    for name in set(sys.modules) - before:
        if name.startswith("tda_problem_"):
            del sys.modules[name]


def refused(spec, options=None):
    with pytest.raises(InputError) as error:
        load_problem(str(spec), options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_problem_is_loaded_from_a_file_or_a_package_with_its_options(write):
    found = load_problem(f"{write(GOOD)}:Mine", {"width": 5})
    assert found.model().out_features == 5
    assert isinstance(load_problem("tda.problems.digits:Digits", {"queries": 4}), Digits)


def test_a_problem_from_a_file_is_imported_once_and_can_be_pickled(write):
    spec = f"{write(GOOD)}:Mine"
    first = load_problem(spec)
    assert type(load_problem(spec)) is type(first)
    assert type(pickle.loads(pickle.dumps(first))) is type(first)  # noqa: S301


def test_files_of_one_name_in_two_folders_are_two_problems(write, tmp_path):
    (tmp_path / "other").mkdir()
    first, second = (
        load_problem(f"{write(text, name)}:Mine") for text, name in ((GOOD, "mine.py"), (GOOD.replace("=3", "=4"), "other/mine.py"))
    )
    assert (first.width, second.width) == (3, 4)


@pytest.mark.parametrize("spec", ["", "digits", "Digits", ":Digits", "tda.problems.digits:"])
def test_a_name_without_a_place_or_a_class_is_refused(spec):
    assert 'must be "package.module:Class" or "path/to/file.py:Class"' in refused(spec)


def test_an_import_that_fails_is_reported_with_its_cause(write):
    assert "importing no_such_package failed: ModuleNotFoundError: No module named 'no_such_package'" in refused("no_such_package:Mine")
    assert "SyntaxError" in refused(f"{write('def broken(:')}:Mine")
    assert "ZeroDivisionError: division by zero" in refused(f"{write('1 / 0')}:Mine")
    assert "AssertionError" in refused(f"{write('assert False')}:Mine")
    text = refused(f"{write('raise ValueError(chr(10).join(map(str, range(9))))')}:Mine")
    assert "ValueError: 0" in text
    path = write(GOOD)
    assert load_problem(f"{path}:Mine").width == 3  # a file whose import failed is read again


def test_a_file_or_a_class_that_is_not_there_is_named(write, tmp_path):
    assert f"problem file {tmp_path / 'absent.py'} does not exist" in refused(tmp_path / "absent.py:Mine")
    assert "has no class Yours; it has Mine" in refused(f"{write(GOOD)}:Yours")
    assert "has no class Yours; it has no Problem class" in refused(f"{write('x = 1', 'empty.py')}:Yours")
    assert "tda is not a subclass of tda.Problem" in refused(f"{write(GOOD)}:tda")


@pytest.mark.parametrize("method", ["model", "train_data", "query_data"])
def test_a_required_method_that_lacks_is_named(write, method):
    text = GOOD.replace(f"def {method}(", "def other(")
    assert f"Mine lacks the required method {method}" in refused(f"{write(text)}:Mine")


def test_a_likelihood_that_lacks_is_named(write):
    assert "Mine has no `likelihood`" in refused(f"{write(GOOD.replace('likelihood =', 'chance ='))}:Mine")


def test_options_that_do_not_fit_are_refused_with_the_signature(write):
    said = refused(f"{write(GOOD)}:Mine", {"wdth": 4})
    assert "[problem_options] do not fit Mine(width=3)" in said
    assert "'wdth'" in said


def test_the_digest_changes_with_the_name_the_options_and_the_source(write):
    spec = f"{write(GOOD)}:Mine"
    digest = problem_digest(spec, {"width": 3})
    assert digest == problem_digest(spec, {"width": 3})
    assert digest != problem_digest(spec, {"width": 4})
    assert digest != problem_digest(f"{write(GOOD + '# changed', 'other.py')}:Mine", {"width": 3})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's: problem.py imports constants.py inside a function, and deep.py by way of middle.py."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    texts = {
        "__init__": "",
        "constants": "WIDTH = 3\n",
        "deep": "SCALE = 1.0\n",
        "middle": "from . import deep\n",
        "problem": GOOD.replace("import tda\n", "import tda\nfrom . import middle\n").replace(
            "return torch.nn.Linear(2, self.width)",
            f"from {name}.constants import WIDTH; return torch.nn.Linear(2, WIDTH)",
        ),
    }
    folder = tmp_path / name
    folder.mkdir()
    for module, text in texts.items():
        (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield folder
    for module in set(sys.modules) - before:
        del sys.modules[module]


def forget(package):
    """As a new process would be."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.parametrize("module", ["problem", "constants", "middle", "deep", "__init__"])
def test_the_digest_changes_with_every_module_of_the_users_that_the_problem_imports(package, module):
    spec = f"{package.name}.problem:Mine"
    digest = problem_digest(spec, {})
    (package / "unrelated.py").write_text("x = 1")
    forget(package)
    assert problem_digest(spec, {}) == digest
    (package / f"{module}.py").write_text((package / f"{module}.py").read_text() + "# changed\n")
    forget(package)
    assert problem_digest(spec, {}) != digest


def test_the_digest_of_a_file_changes_with_what_it_imports(package, write):
    file = write(GOOD.replace("import tda\n", f"import tda\nfrom {package.name} import deep as inner\n"))
    digest = problem_digest(f"{file}:Mine", {})
    (package / "deep.py").write_text("SCALE = 2.0\n")
    forget(package)
    assert problem_digest(f"{file}:Mine", {}) != digest


def test_installed_packages_count_by_version_and_tda_by_its_own(monkeypatch):
    names = set(sources(sys.modules[Digits.__module__]))
    assert "" in names
    assert not {name.partition(".")[0] for name in names} & {"torch", "numpy", "sklearn", "collections", "__future__"}
    assert all(name.startswith("tda.problems") for name in names if name)
    digest = problem_digest("tda.problems.digits:Digits", {})
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert problem_digest("tda.problems.digits:Digits", {}) != digest


@pytest.mark.parametrize("module", ["problem", "deep"])
def test_a_module_that_was_edited_after_its_import_is_refused_rather_than_run_as_it_was(package, module):
    spec = f"{package.name}.problem:Mine"
    load_problem(spec)
    (package / f"{module}.py").write_text((package / f"{module}.py").read_text() + "# changed\n")
    assert f"{package / module}.py was edited after this process had imported it; restart the process" in refused(spec)
    with pytest.raises(InputError, match="was edited after this process had imported it"):
        problem_digest(spec, {})
    importlib.reload(sys.modules[f"{package.name}.{module}"])
    load_problem(spec)


def test_a_problem_whose_own_code_raises_is_named(write):
    said = refused(f"{write(GOOD.replace('self.width = width', 'open(chr(47) + str(width))'))}:Mine")
    assert "Mine(...) with its [problem_options] failed: FileNotFoundError: " in said


def test_a_likelihood_given_as_a_class_is_refused(write):
    assert "Mine.likelihood is the class Categorical; write likelihood = Categorical()" in refused(
        f"{write(GOOD.replace('Categorical()', 'Categorical'))}:Mine"
    )


def test_a_direction_that_is_none_is_refused(write):
    text = GOOD.replace("likelihood =", 'better = "up"\n    likelihood =')
    assert 'Mine.better is \'up\'; write "lower" or "higher"' in refused(f"{write(text)}:Mine")


def test_what_a_problem_does_not_define_has_a_default_or_a_way_out(write):
    problem = load_problem(f"{write(GOOD)}:Mine")
    assert not can_fit(problem)
    assert can_fit(Digits())
    assert measurement_of(problem) == {"name": "loss", "better": "lower"}
    with pytest.raises(InputError, match=r"Mine has no fit\(model, dataset, \*, seed, on_checkpoint\): give a checkpoint or define it"):
        problem.fit(None, None, seed=0, on_checkpoint=print)
    assert torch.equal(problem.describe("query", 0), torch.ones(2))


def test_an_own_measurement_says_which_direction_is_good():
    class Margin(Digits):
        better = "higher"

        def measurement(self, outputs, targets):
            return outputs[:, 0]

    assert measurement_of(Margin()) == {"name": "measurement", "better": "higher"}


def test_a_problem_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Problem()


def test_threads_that_parse_at_the_same_time_do_not_stop_each_other(monkeypatch):
    wanted, failing, parse = set(sources(sys.modules[Digits.__module__])), [True, True], ast.parse

    def sometimes(text):
        if failing:
            failing.pop()
            raise SystemError("AST constructor recursion depth mismatch (before=84, after=77)")
        return parse(text)

    monkeypatch.setattr(ast, "parse", sometimes)
    assert set(sources(sys.modules[Digits.__module__])) == wanted
    assert not failing
