"""Bad input: one line on standard error that names the thing, the value and the way out; status 2; nothing written."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import cli
from tests.flows.runs import CONFIG, PROBLEM, write_config
from tests.stored_run import write_run

Edit = tuple[str, str]
Tell = Callable[..., str]


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch, prefect_api: None) -> None:
    monkeypatch.delenv("TDA_STORE", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tell:
    """`tda run` on the tiny problem, edited: the one line that it prints. It must end with status 2 and leave the store as it was."""

    def run(*arguments: str, config: Edit = ("", ""), problem: Edit = ("", ""), store: str = "") -> str:
        where = tmp_path / "store"
        before = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
        file = write_config(tmp_path / "config", edited(CONFIG, config), edited(PROBLEM, problem))
        status = cli.status(["run", str(file), "--store", store or str(where), *arguments])
        printed = capsys.readouterr()
        assert status == cli.BAD_INPUT, printed.err
        assert printed.out == ""
        assert printed.err.startswith("tda: ")
        assert printed.err.count("\n") == 1, printed.err
        assert {path: path.read_bytes() for path in where.rglob("*") if path.is_file()} == before
        assert before or not where.exists()
        return printed.err.removeprefix("tda: ").replace(str(tmp_path), "~").strip()

    return run


def edited(text: str, edit: Edit) -> str:
    assert edit[0] in text
    return text.replace(*edit) if edit[0] else text


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {"0.weight": torch.ones(5, 6), "0.bias": torch.ones(5), "2.weight": torch.ones(5), "2.bias": torch.ones(5),
            "3.weight": torch.ones(3, 5), "3.bias": torch.ones(3)}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (('problem = "tiny.py:Tiny"', ""), 'run.toml: missing key "problem"; add problem = "'),
        (("problem =", "probelm ="), 'run.toml: unknown key "probelm"; did you mean "problem"?'),
        (("shard_size = 2", 'shard_size = "2"'), 'run.toml: shard_size must be a whole number, got "2"'),
        (('"ekfac"', '"ekfak"'), "run.toml: unknown method 'ekfak'; did you mean 'ekfac'?"),
        (("damping = 0.01", "damping = -0.01"), 'damping must be a finite number >= 0 or "heuristic", got -0.01 (method \'ekfac\')'),
        (("damping = 0.01", "dampnig = 0.01"), "method 'ekfac': unknown option 'dampnig'; did you mean 'damping'?"),
        (('"sampled"', '"smapled"'), "fisher = 'smapled'"),
        (('"graddot"', '"kfac"'), "two methods are labelled 'kfac'; give one of them its own label"),
        (("tiny.py", "tony.py"), "~/config/tony.py does not exist; the path is taken from the folder of the configuration"),
        (("tiny.py:Tiny", "tiny.py:Tony"), "has no class Tony; it has Tiny"),
        (("tiny.py:Tiny", "tiny.py:Data"), "Data is not a subclass of tda.Problem"),
        (("tiny.py:Tiny", "no.such.module:Tiny"), "importing no.such.module failed: ModuleNotFoundError: No module named 'no'"),
        (("shard_size = 2", "problem_options = {exmaples = 3}"), "exmaples"),
        (("shard_size = 2", 'checkpoint = "nowhere.safetensors"'), "checkpoint file://~/config/nowhere.safetensors does not exist"),
        (("shard_size = 2", 'modules = ["transformer.*"]'), "transformer.*"),
        (("shard_size = 2", 'dtype = "float64"\nproducts = "bfloat16"'), 'products = "bfloat16" makes no sense with dtype = "float64"'),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_run_is_refused(told: Tell, config: Edit, words: str) -> None:
    assert words in told(config=config)


INPUTS = "        return self.x[i], self.y[i]\n"
NAN = "        return self.x[i] * (torch.nan if i == 7 else 1), self.y[i]\n"
LATE = "        return self.x[i % 20], self.y[i % 20] * (i != 1150) + (i == 1150) * {}\n    def __len__(self):\n        return 1200\n"
MEASURED = "    def measurement(self, outputs, targets):\n        return {}\n"
HELPERS = """
class Huge(nn.Module):
    def forward(self, x):
        return x * 1e308 * 1e308

class Mean(tda.Categorical):
    def loss(self, outputs, targets):
        return super().loss(outputs, targets).mean()

class Tiny("""


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (("import torch\n", "import troch\n"), "importing ~/config/tiny.py failed: ModuleNotFoundError: No module named 'troch'"),
        (("import torch\n", "import torch,\n"), "importing ~/config/tiny.py failed: SyntaxError"),
        (("def query_data(self)", "def querydata(self)"), "Tiny lacks the required method query_data"),
        (("    likelihood = tda.Categorical()\n", ""), "Tiny has no `likelihood`; add e.g. likelihood = tda.Categorical()"),
        (("def fit(", "def fitt("), "has no fit method and the config no checkpoint; give one of them"),
        (("nn.Linear(6, 5)", "nn.Linear(7, 5)"), "mat1 and mat2 shapes cannot be multiplied"),
        (("return layers.to(", "return layer.to("), "NameError: name 'layer' is not defined (~/config/tiny.py:"),
        (("Data(self.examples, self.seed, self.traps)", "[]"), "train_data() is empty"),
        (('Data(self.queries, 2, "")', "[]"), "query_data() is empty"),
        (("Data(self.examples, self.seed, self.traps)", "iter([])"), "train_data() must be map-style with a length"),
        ((INPUTS, NAN), "train example 7 has inputs or targets that are NaN or infinite"),
        ((INPUTS, "        return self.x[i], self.y[i] + 3 * (i == 17)\n"), "is out of range: the model has classes 0..2"),
        ((INPUTS, LATE.format(-100)), "train example 1150: target -100 is out of range: the model has classes 0..2"),
        ((INPUTS, LATE.format(3)), "train example 1150: target 3 is out of range"),
        ((INPUTS, "        return self.x[i] + torch.rand(()), self.y[i]\n"), "train example 0 differs when it is read again; switch"),
        ((INPUTS, "        return self.x[i], self.y[i].double()\n"), "targets must be integer class indices, got dtype torch.float64"),
        ((INPUTS, "        return self.x[i]\n"), "dataset[i] must return (inputs, targets)"),
        ((INPUTS, "        raise OSError(5, 'Input/output error')\n"), "OSError: [Errno 5] Input/output error (~/config/tiny.py:"),
        (("nn.Linear(5, 3))", "nn.Linear(5, 3), nn.Flatten(0))"), "Categorical takes outputs (batch, classes) and targets (batch,)"),
        (("nn.LayerNorm(5)", "nn.LayerNorm(5), Huge()"), "the loss of train example 0 is nan"),
        (("    def fit(", MEASURED.format("outputs.mean()") + "    def fit("), "the measurement must be one number per example"),
        (("    def fit(", MEASURED.format("outputs[:, 0] / (0 * targets)") + "    def fit("), "the measurement of query example 0 is"),
        (("likelihood = tda.Categorical()", "likelihood = Mean()"), "the loss must be one number per example"),
        (("likelihood = tda.Categorical()", "likelihood = tda.TokenCategorical()"), "TokenCategorical"),
    ],
)  # fmt: skip
def test_a_problem_that_cannot_be_attributed_is_refused(told: Tell, problem: Edit, words: str) -> None:
    whole = edited(PROBLEM, problem).replace("\nclass Tiny(", HELPERS)
    assert words in told(problem=(PROBLEM, whole))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("3.bias"), "missing: 3.bias"),
        (lambda w: w.update({"4.bias": torch.ones(3)}), "unknown: 4.bias"),
        (lambda w: w.update({"3.weight": torch.ones(3, 6)}), "of another shape: 3.weight (3, 6) instead of (3, 5)"),
        (lambda w: w["2.weight"].fill_(torch.nan), "2.weight holds NaN or infinite weights"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_which_tensors(told: Tell, tmp_path: Path, change: Callable, words: str) -> None:
    state = weights(tmp_path)
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    line = told("--set", f"checkpoint={tmp_path}/weights.safetensors")
    assert "checkpoint file://~/weights.safetensors" in line
    assert words in line


def test_a_truncated_checkpoint_or_a_pickle_is_refused_and_never_loaded(told: Tell, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(weights(tmp_path), file)
    assert set(load_file(file)) == set(weights(tmp_path))
    file.write_bytes(file.read_bytes()[:-20])
    assert "is not a whole safetensors file" in told("--set", f"checkpoint={file}")
    file.write_bytes(pickle.dumps(Mischief(tmp_path / "loaded")))
    assert "save it with safetensors.torch.save_file" in told("--set", f"checkpoint={file}")
    torch.save(weights(tmp_path), file)
    assert "is not a whole safetensors file" in told("--set", f"checkpoint={file}")
    assert not (tmp_path / "loaded").exists()


class Mischief:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_store_that_is_absent_or_cannot_be_written_is_refused(told: Tell, tmp_path: Path) -> None:
    line = told(store=f"{tmp_path}/no/such/store")
    assert line == "file://~/no/such/store: ~/no/such does not exist; create it (mkdir -p ~/no/such) or choose another store"
    (tmp_path / "file").touch()
    assert "~/file is not a folder; choose another store" in told(store=f"{tmp_path}/file")
    assert "cannot write to /proc" in told(store="/proc/store")
    assert "scheme 'gs'" in told(store="gs://bucket/x")


def test_a_bucket_that_is_absent_is_refused(told: Tell, moto_s3: str) -> None:
    line = told(store="s3://no-such-bucket-here/prefix")
    assert line == 's3://no-such-bucket-here/prefix: bucket "no-such-bucket-here" does not exist; create it, or name another in "store"'


@pytest.mark.s3
def test_wrong_credentials_are_refused_and_not_repeated(told: Tell, rgw_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import forget_s3

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrongsecret")
    forget_s3()
    line = told(store=f"{rgw_s3}/prefix")
    assert "S3 refuses access to bucket" in line
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in line
    assert "secret" not in line.replace("SECRET", "").lower()


def test_the_exact_fisher_of_token_labels_is_refused(told: Tell) -> None:
    edits = PROBLEM.replace("tda.Categorical()", "tda.TokenCategorical()").replace(
        "nn.Linear(6, 5)", "nn.Unflatten(1, (6, 1)), nn.Linear(1, 5)"
    )
    edits = edits.replace("torch.randint(3, (count,)", "torch.randint(3, (count, 6)")
    line = told(problem=(PROBLEM, edits))
    assert 'fisher = "exact" cannot enumerate the labels of 6 tokens x 3 words; use fisher = "sampled" or "empirical"' in line


def test_what_a_newer_version_has_stored_is_not_misread(told: Tell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    write_run(store, "20260101-000000-aaaaaa", schema_version=2)
    for arguments in (["show"], ["top", "--query", "1"], ["report"]):
        assert cli.status([*arguments, "--store", str(store)]) == cli.BAD_INPUT
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "has schema_version 2, and this tda reads up to 1; upgrade tda to open it" in printed.err
        assert printed.err.count("\n") == 1
    assert "has schema_version 2, and this tda reads up to 1; upgrade tda" in told()


def test_a_prefect_server_that_does_not_answer_is_told_at_once(told: Tell) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        line = told()
    assert line.startswith("no Prefect server answers at PREFECT_API_URL = http://127.0.0.1:9/api (")
    assert line.endswith("); start it, correct the URL, or unset it")


def test_the_store_is_checked_before_the_data_are_read(told: Tell, tmp_path: Path) -> None:
    assert "~/no/such does not exist" in told(problem=(INPUTS, "        raise RuntimeError\n"), store=f"{tmp_path}/no/such/store")
