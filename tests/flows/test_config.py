"""A configuration is refused in one line that names file, key, value and way out; a good one is read exactly."""

from pathlib import Path

import pytest

from flows.config import RunConfig, load_config
from infra.cluster import ClusterSpec
from tda.errors import InputError

GOOD = 'problem = "tda.problems.digits:Digits"\n{}\n[[methods]]\nname = "ekfac"\n{}\n'
FOLDER = Path(__file__).parents[2] / "docs" / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.toml") if not path.stem.startswith("ladder-"))


def write(folder: Path, top: str = "", below: str = "") -> Path:
    file = folder / "digits.toml"
    file.write_text(GOOD.format(top, below))
    return file


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(file), file.name)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_accepted(example: Path) -> None:
    assert load_config(example).methods


def test_the_demo_names_what_it_runs() -> None:
    config = load_config(EXAMPLES[0].with_name("digits.toml"))
    assert [method["name"] for method in config.methods] == ["graddot", "kfac", "ekfac"]
    assert ClusterSpec(**config.cluster.model_dump()) == config.cluster.spec() == ClusterSpec("local", workers=2)


def test_a_configuration_survives_json(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "seed = 3", '[cluster]\nmemory_limit = "4GiB"'))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_relative_paths_lie_beside_the_file_but_the_store_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "run.toml"
    file.write_text('problem = "mine.py:Mine"\ncheckpoint = "weights.safetensors"\nstore = "./store"\n[[methods]]\nname = "graddot"\n')
    config = load_config("configs/run.toml")
    assert config.problem == f"{tmp_path}/configs/mine.py:Mine"
    assert config.checkpoint == f"file://{tmp_path}/configs/weights.safetensors"
    assert config.store == f"file://{tmp_path}/store"
    assert load_config(file, store="s3://bucket/prefix/").store == "s3://bucket/prefix"


def test_overrides_win_over_the_file_and_reach_into_tables(tmp_path: Path) -> None:
    file = write(tmp_path, "seed = 1", "damping = 0.1")
    overrides = [
        "seed=7",
        "cluster.workers=4",
        "cluster.memory_limit=4GiB",
        "methods.0.damping=1e-3",
        "problem_options.width=32",
        'exclude=["0"]',
    ]
    config = load_config(file, overrides)
    assert (config.seed, config.cluster.workers, config.cluster.memory_limit, config.exclude) == (7, 4, "4GiB", ["0"])
    assert config.methods == [{"name": "ekfac", "damping": 1e-3}]
    assert config.problem_options == {"width": 32}


@pytest.mark.parametrize(
    ("top", "below", "message"),
    [
        ("metods = 1", "", 'digits.toml: unknown key "metods"; did you mean "methods"?'),
        ("", "[cluster]\nwokers = 3", 'digits.toml: unknown key "cluster.wokers"; did you mean "workers"?'),
        ("qqq = 1", "", 'digits.toml: unknown key "qqq"; known are problem, '),
        ('dtype = "flaot32"', "", 'digits.toml: dtype must be "auto", "float32" or "float64", got "flaot32"; did you mean "float32"?'),
        ('seed = "0"', "", 'digits.toml: seed must be a whole number, got "0"'),
        ("seed = -1", "", "digits.toml: seed must be at least 0, got -1"),
        ("batch_size = 0", "", "digits.toml: batch_size must be at least 1, got 0"),
        ("self_influence = 1", "", "digits.toml: self_influence must be true or false, got 1"),
        ('modules = "fc*"', "", 'digits.toml: modules must be a list, got "fc*"'),
        ("modules = []", "", "digits.toml: modules must not be empty, got []"),
        ("cluster = 3", "", "digits.toml: cluster must be a table, got 3"),
        ('store = "gs://bucket"', "", "digits.toml: store URL 'gs://bucket' has the scheme 'gs'"),
        (
            "",
            '[cluster]\nkind = "slrm"',
            'digits.toml: cluster.kind must be "local", "address", "cuda", "slurm", "kubernetes" or "ssh", got "slrm"; did you mean',
        ),
        ("", '[cluster.slurm]\nquue = "long"', 'digits.toml: unknown key "cluster.slurm.quue"; did you mean "queue"?'),
        ("", '[cluster]\nkind = "slurm"', 'digits.toml: cluster.kind = "slurm" needs cluster.memory_limit; add memory_limit = "16GiB"'),
        (
            "",
            '[cluster]\nkind = "slurm"\nmemory_limit = "1GiB"\n[cluster.slurm]\nqueue = "long"',
            "digits.toml: cluster.slurm needs either interface or host",
        ),
        ("", '[cluster]\nkind = "ssh"', 'digits.toml: cluster.kind = "ssh" needs cluster.ssh; add a table [cluster.ssh] with hosts'),
        ("", '[cluster.ssh]\nhosts = ["a"]', 'digits.toml: cluster.ssh is used only with cluster.kind = "ssh"'),
        ("", '[cluster]\nkind = "ssh"\n[cluster.ssh]\nhosts = []', "digits.toml: cluster.ssh.hosts must not be empty, got []"),
        ("", '[cluster]\nkind = "cuda"\nworkers = 4', "digits.toml: cluster.workers does not change that there is one worker for each GPU"),
        (
            "",
            '[cluster]\nkind = "address"\naddress = "tls://h:1"\n[cluster.tls]\nca = "ca.pem"\ncert = "/c"\nkey = "/k"',
            "digits.toml: cluster.tls.ca must be an absolute path, the same on every host, got",
        ),
        ("", '[cluster]\nkind = "address"', 'digits.toml: cluster.kind = "address" needs cluster.address'),
        ("", '[cluster]\naddress = "tcp://h:1"', 'digits.toml: cluster.address = "tcp://h:1" is used only with cluster.kind = "address"'),
        ("", '[cluster]\nmemory_limit = "much"', "digits.toml: cluster.memory_limit must be a number of bytes or a text"),
        ("", '[cluster]\nmemory_limit = "1.2.3GiB"', "digits.toml: cluster.memory_limit must be a number of bytes or a text"),
        ("", '[cluster]\nmemory_limit = "0GiB"', "digits.toml: cluster.memory_limit must be a number of bytes or a text"),
        ("", '[cluster]\nmemory_limit = ".GiB"', "digits.toml: cluster.memory_limit must be a number of bytes or a text"),
        ("", '[cluster]\nkind = "ssh"\n[cluster.ssh]\nhosts = "node1"', "digits.toml: cluster.ssh.hosts must be a list"),
        (
            "",
            '[cluster]\nkind = "address"\naddress = "tcp://h:1"\nworkers = 8',
            "digits.toml: cluster.workers does not change the workers at",
        ),
        ("", '[cluster]\nkind = "address"\naddress = "tcp://h:1"\nthreads = 4', "digits.toml: cluster.threads does not change the workers"),
        (
            "problem_options = {day = 2026-11-22}",
            "",
            "digits.toml: problem_options.day is 2026-11-22, which JSON does not have; write it as",
        ),
        ("problem_options = {a = [nan]}", "", "digits.toml: problem_options.a is [nan], which JSON does not have"),
        ("", "damping = -1", "digits.toml: damping must be"),
        ("", '[[methods]]\nname = "ekfax"', "digits.toml: unknown method 'ekfax'; did you mean"),
        ("a b = 1", "", "digits.toml: is not valid TOML: "),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_way_out(tmp_path: Path, top: str, below: str, message: str) -> None:
    assert refusal(write(tmp_path, top, below)).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("metods=1", '--set metods=1: unknown key "metods"; did you mean "methods"?'),
        ("seed", '--set "seed": is not key=value; for example --set seed=1'),
        ("=1", '--set "=1": is not key=value'),
        ("cluster.workers=0", "--set cluster.workers=0: cluster.workers must be at least 1, got 0"),
        ("methods.0.damping=-3", "--set methods.0.damping=-3: damping must be"),
        ("methods.3.damping=1", '--set "methods.3.damping=1": "methods.3" does not exist; the list has 1, counted from 0'),
        ("seed.x=2", '--set seed.x=2: seed must be a whole number, got {"x": 2}'),
        ("problem.x=2", '--set "problem.x=2": "problem" is "tda.problems.digits:Digits", not a table; set it as a whole'),
        ("problem=nix", '--set problem=nix: problem must be "package.module:Class" or "path/to/file.py:Class", got "nix"'),
        ("problem=a.py:B", '--set problem=a.py:B: problem "a.py:B": '),
    ],
)
def test_a_wrong_override_is_named_as_what_it_is(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(write(tmp_path), override).startswith(message)


def test_a_misspelt_key_explains_the_missing_one(tmp_path: Path) -> None:
    file = tmp_path / "digits.toml"
    file.write_text('problm = "a:B"\n[[methods]]\nname = "kfac"\n')
    assert refusal(file) == 'digits.toml: unknown key "problm"; did you mean "problem"?'
    file.write_text('[[methods]]\nname = "kfac"\n')
    assert refusal(file).startswith('digits.toml: missing key "problem"; add problem = ')
    file.write_text('problem = "a:B"\n')
    assert refusal(file).startswith('digits.toml: missing key "methods"; add a table [[methods]]')


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    assert "no such file; did you mean" in refusal(tmp_path / "digit.toml")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'problem = "\xe4"')
    assert "is not UTF-8 text (byte 11)" in refusal(tmp_path / "latin.toml")
