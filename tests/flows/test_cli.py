"""The command line: what it prints, and the exit status that a scheduler sees."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.doctor import Finding, examine, print_findings
from infra.cluster import ClusterError, ShardFailed
from infra.storage import StoreError
from tda.errors import InputError
from tests.stored_run import write_run

CONFIG = 'problem = "tda.problems.digits:Digits"\n[[methods]]\nname = "ekfac"\n'


def tda(*arguments: str) -> int:
    return cli.status(list(arguments))


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TDA_STORE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def store(tmp_path: Path) -> str:
    write_run(tmp_path / "store", "20260101-000000-aaaaaa", created="2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "store", "20260102-000000-bbbbbb", created="2026-01-02T00:00:00+00:00")
    return str(tmp_path / "store")


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What attribute_run does, without Prefect: raises or returns the one thing in this list."""
    from flows import attribute

    found: list[object] = []

    def attribute_run(config: object, command: str) -> object:
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    monkeypatch.setattr(attribute, "attribute_run", attribute_run)
    return found


def test_runs_lists_newest_first(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tda("runs", "--store", store) == 0
    printed = capsys.readouterr().out
    assert printed.index("bbbbbb") < printed.index("aaaaaa")
    assert "2026-01-02 00:00:00" in printed


def test_runs_of_an_empty_store_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tda("runs", "--store", str(tmp_path)) == 0
    assert "`tda run CONFIG` makes one" in capsys.readouterr().out


def test_the_store_may_come_from_the_environment(store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TDA_STORE", store)
    assert tda("runs") == 0
    assert "aaaaaa" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["latest", "20260102", "20260102-000000-bbbbbb"])
def test_show_tells_what_a_run_states_about_itself(store: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tda("show", run, "--store", store) == 0
    printed = capsys.readouterr().out
    for word in (
        "bbbbbb",
        "complete",
        "coverage",
        "parameters",
        "sign",
        "units",
        "damping ekfac",
        "seeds",
        "versions",
        "wall s",
        "attention",
    ):
        assert word in printed


def test_top_prints_the_ranking(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tda.results import open_run

    assert tda("top", "latest", "--query", "3", "-k", "4", "--method", "graddot", "--kind", "harmful", "--store", store) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = open_run(store).top(3, k=4, method="graddot", kind="harmful")["train"].tolist()
    assert [int(line.split()[1]) for line in lines if line.split()[:1] in (["1"], ["2"], ["3"], ["4"])] == expected


def test_report_gives_the_path_or_a_copy(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(store) / "runs" / "20260102-000000-bbbbbb" / "report.html"
    assert tda("report", "--store", store) == cli.BAD_INPUT, "it has none yet"
    page.write_text("<html>")
    capsys.readouterr()
    assert tda("report", "latest", "--store", store) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert tda("report", "--store", store, "-o", str(tmp_path / "copy.html")) == 0
    assert (tmp_path / "copy.html").read_text() == "<html>"
    assert tda("report", "--store", store, "-o", str(tmp_path / "no" / "copy.html")) == cli.BAD_INPUT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "nowhere.toml"], "nowhere.toml: no such file"),
        (["top", "--query", "x"], "--query"),
        (["top", "--query", "99"], "has no query 99"),
        (["top", "--query", "1", "--kind", "good"], "--kind"),
        (["top", "--query", "1", "-k", "0"], "-k"),
        (["show", "zzz"], "no run 'zzz'"),
        (["show", "2026010"], "could be any of 2"),
        (["show", "--stoer", "x"], "--stoer"),
        (["runs", "--store", "gs://bucket"], "scheme 'gs'"),
    ],
)
def test_bad_input_is_one_line_on_standard_error_and_status_2(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("TDA_STORE", store)
    assert tda(*arguments) == cli.BAD_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("loss is not\nper-example"), cli.BAD_INPUT),
        (StoreError("file:/x: not writable"), cli.BAD_INPUT),
        (ClusterError("no scheduler"), cli.BAD_INPUT),
        (ShardFailed("score", 3, MemoryError("full")), cli.FAILED),
        (KeyboardInterrupt(), cli.INTERRUPTED),
    ],
)
def test_what_a_run_raises_decides_the_exit_status(
    tmp_path: Path, outcome: list[object], capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    outcome.append(error)
    assert tda("run", str(tmp_path / "run.toml"), "--store", str(tmp_path / "store")) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("tda: ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_a_failed_run_has_status_1(tmp_path: Path, outcome: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    from flows.attribute import RunFailed

    (tmp_path / "run.toml").write_text(CONFIG)
    outcome.append(RunFailed("stage 'score', shard 3: full; `tda run run.toml` resumes it"))
    assert tda("run", str(tmp_path / "run.toml")) == cli.FAILED
    assert "resumes it" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path, outcome: list[object]) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    outcome.append(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        tda("run", str(tmp_path / "run.toml"))


def test_a_run_ends_with_examples_id_report_and_the_line_for_a_notebook(
    store: str, tmp_path: Path, outcome: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.attribute import RunSummary

    (tmp_path / "run.toml").write_text(CONFIG)
    url = f"file://{store}/runs/20260102-000000-bbbbbb"
    outcome.append(RunSummary("20260102-000000-bbbbbb", url, f"{url}/report.html", f"file://{store}", ["factors (exact)"]))
    assert tda("run", str(tmp_path / "run.toml")) == 0
    printed = capsys.readouterr().out
    assert "most helpful" in printed
    assert "most harmful" in printed
    assert "reused   factors (exact)" in printed
    assert f"report   {store}/runs/20260102-000000-bbbbbb/report.html" in printed
    line = next(line for line in printed.splitlines() if line.startswith("open "))
    namespace: dict[str, object] = {}
    exec(line.removeprefix("open").strip(), namespace)  # noqa: S102  (the very line that a user pastes)
    assert namespace["run"].id == "20260102-000000-bbbbbb"  # type: ignore[attr-defined]


def test_help_is_quick_and_a_slip_is_told_before_prefect_is_imported(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("metods = 1\n" + CONFIG)
    code = "import sys; from flows import cli; code = cli.status({}); assert not {} & set(sys.modules); sys.exit(code)"

    def used() -> float:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime

    def python(arguments: list[str], unwanted: set[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code.format(arguments, unwanted)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)

    begin = used()
    told = python(["--help"], {"prefect", "torch", "zarr", "distributed"})
    assert used() - begin < 2  # it takes 0.3 s of a processor, however busy the machine
    assert told.returncode == 0, told.stderr
    for command in ("run", "runs", "show", "top", "report", "doctor"):
        assert command in told.stdout
    done = python(["run", str(tmp_path / "run.toml")], {"prefect", "distributed"})
    assert (done.returncode, done.stderr) == (2, f'tda: {tmp_path}/run.toml: unknown key "metods"; did you mean "methods"?\n')


def test_the_doctor_finds_a_sound_installation_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(str(tmp_path / "store"))
    assert {finding.what for finding in found} == {"Python", "storage", "cluster", "Prefect", "versions", "GPU"}
    assert print_findings(found), capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "a check leaves nothing behind"


def test_the_doctor_says_what_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from flows import doctor

    monkeypatch.setattr(doctor, "_cluster", lambda: Finding("cluster", works=True, seen=""))
    monkeypatch.setattr(doctor, "_prefect", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "version", {"prefect": "3.8.8", "fastapi": "0.151.0", "sqlalchemy": "2.0.58"}.__getitem__)
    assert tda("doctor", "--store", str(tmp_path / "no" / "store")) == cli.FAILED
    printed = capsys.readouterr().out
    for words in ("does not exist", "mkdir -p", "fastapi 0.151.0 is not <0.151", "-c constraints.txt", "ZeroDivisionError"):
        assert words in printed
