"""A nightly run takes the newest checkpoint, does nothing where nothing changed, and shows itself in Prefect."""

import os
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from safetensors.torch import save_file

import tda
from flows import cli, nightly_told
from flows import nightly as flow
from flows.config import load_config
from flows.newest import newest
from tda.errors import InputError
from tda.problem import load_problem
from tests.flows.runs import manifests, write_config

CONFIG = """
problem = "tiny.py:Tiny"
checkpoint = "ckpt/step-*.safetensors"
shard_size = 8
[[methods]]
name = "ekfac"
fisher = "exact"
damping = 0.01
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = write_config(tmp_path / "config", CONFIG)
    (path.parent / "ckpt").mkdir()
    write_checkpoint(path, 1, at=1000)
    return path


def write_checkpoint(config: Path, step: int, at: float) -> Path:
    """The weights that the model starts with, scaled, in a file written at a moment."""
    model = load_problem(f"{config.parent}/tiny.py:Tiny", {}).model()
    file = config.parent / "ckpt" / f"step-{step}.safetensors"
    save_file({name: tensor * (1 + step / 10) for name, tensor in model.state_dict().items()}, file)
    os.utime(file, (at, at))
    return file


def refused(*_: object) -> None:
    pytest.fail("a cluster was started for nothing")


def fire(config: Path, store: Path, *overrides: str):
    """One firing, in this process: the state that it ends in."""
    parsed = load_config(config, overrides, str(store), pin=False)
    return flow.nightly(parsed.model_dump(mode="json"), str(config.parent), return_state=True)


def test_the_newest_match_is_the_one_written_last_and_of_those_the_last_by_name(tmp_path: Path) -> None:
    for name, at in {"step-9": 50, "step-10": 40, "step-2": 50, "other": 90}.items():
        file = tmp_path / "a[1]?" / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
        os.utime(file, (at, at))
    assert newest(f"file://{tmp_path}/a[1]?/step-*.safetensors") == f"file://{tmp_path}/a[1]?/step-9.safetensors"
    assert newest(f"file://{tmp_path}/*/o*") == f"file://{tmp_path}/a[1]?/other.safetensors"
    for folder, at in {"old": 10, "new": 20}.items():  # a folder of shards is as new as the newest of them
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / "models" / folder / "model-00001.safetensors").write_bytes(b"x")
        os.utime(tmp_path / "models" / folder / "model-00001.safetensors", (at, at))
    os.utime(tmp_path / "models" / "old")
    assert newest(f"file://{tmp_path}/models/*") == f"file://{tmp_path}/models/new"
    with pytest.raises(InputError, match="matches nothing"):
        newest(f"file://{tmp_path}/none-*")


def test_a_pointer_names_the_checkpoint(tmp_path: Path) -> None:
    pointer = tmp_path / "latest.pointer"
    with pytest.raises(InputError, match="there is no such file"):
        newest(f"file://{pointer}")
    for text, expected in {
        "runs/7.safetensors\n": f"file://{tmp_path}/runs/7.safetensors",
        "/models/a.safetensors": "file:///models/a.safetensors",
        "s3://bucket/a.safetensors": "s3://bucket/a.safetensors",
    }.items():
        pointer.write_text(text)
        assert newest(f"file://{pointer}") == expected
    for wrong in (b"", b"a\nb", b"\xff\xfe", b"x" * 5000):
        pointer.write_bytes(wrong)
        with pytest.raises(InputError, match="must hold one line"):
            newest(f"file://{pointer}")


def test_the_newest_object_of_a_bucket_is_found_and_a_pointer_there_is_relative_to_itself(moto_s3: str) -> None:
    from infra import storage

    for name in ("step-2", "step-1"):
        storage.write_bytes(f"{moto_s3}/ckpt/{name}.safetensors", b"x")
    # moto's clock has whole seconds: both were written at one moment, or the second later.
    assert newest(f"{moto_s3}/ckpt/step-*.safetensors") in {f"{moto_s3}/ckpt/step-{n}.safetensors" for n in (1, 2)}
    storage.write_bytes(f"{moto_s3}/ckpt/latest.pointer", b"step-1.safetensors\n")
    assert newest(f"{moto_s3}/ckpt/latest.pointer") == f"{moto_s3}/ckpt/step-1.safetensors"


def test_tda_run_and_nightly_read_a_pattern_as_what_it_means_now(config: Path) -> None:
    assert load_config(config, pin=False).checkpoint == f"file://{config.parent}/ckpt/step-*.safetensors"
    assert load_config(config).checkpoint == f"file://{config.parent}/ckpt/step-1.safetensors"


def test_a_firing_computes_what_is_new_and_nothing_else(
    config: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    first = fire(config, store, cluster)
    assert (first.type.value, first.name) == ("COMPLETED", "Completed")
    (run,) = manifests(store)
    assert run in first.message
    assert tda.open_run(str(store)).manifest["config"]["checkpoint"].endswith("step-1.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(flow.attribute, "cluster_for", refused)
        write_checkpoint(config, 0, at=500)  # written before the one that was attributed
        again = fire(config, store, cluster)
    assert (again.type.value, again.name) == ("COMPLETED", flow.UNCHANGED)
    assert run in again.message
    assert list(manifests(store)) == [run]

    write_checkpoint(config, 2, at=2000)
    assert fire(config, store, cluster).name == "Completed"
    assert len(manifests(store)) == 2
    assert tda.open_run(str(store)).manifest["config"]["checkpoint"].endswith("step-2.safetensors")


def test_a_firing_shows_its_progress_the_top_and_where_things_are(config: Path, cluster: str, tmp_path: Path) -> None:
    state = fire(config, tmp_path / "store", cluster)
    (run,) = manifests(tmp_path / "store")
    with get_client(sync_client=True) as client:
        made = client.request("POST", "/artifacts/filter", json={}).json()
    mine = {each["key"].rpartition("-")[2]: each for each in made if each["flow_run_id"] == str(state.state_details.flow_run_id)}
    assert set(mine) == {"progress", "top", "report", "store"}
    assert len({each["key"].rpartition("-")[0] for each in mine.values()}) == 1
    assert mine["progress"]["data"] == 100.0
    assert f"{tmp_path}/store/runs/{run}/report.html" in mine["report"]["data"]
    table = [line for line in mine["top"]["data"].splitlines() if line.startswith("| ")]
    assert [line.count(" | ") for line in table] == [2] * 6, "a head, and five queries with both ends each"


def test_a_firing_that_scores_candidates_alone_shows_the_top_of_them(config: Path, cluster: str, tmp_path: Path) -> None:
    config.write_text(f"{config.read_text()}[candidates]\nrandom = 4\n")
    state = fire(config, tmp_path / "store", cluster)
    assert state.name == "Completed", state.message
    run = tda.open_run(tmp_path / "store")
    table = [line for line in nightly_told.page(run, []).splitlines() if line.startswith("| ")]
    best = run.top(0, k=1)["train"].item()
    assert [line.count(" | ") for line in table] == [2] * 6
    assert f": {best} (label" in table[1]


def test_without_a_checkpoint_the_second_firing_finds_the_trained_model_and_does_nothing(
    config: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text().replace('checkpoint = "ckpt/step-*.safetensors"', "ensemble = 2"))
    assert fire(config, tmp_path / "store", cluster).name == "Completed"
    monkeypatch.setattr(flow.attribute, "cluster_for", refused)
    assert fire(config, tmp_path / "store", cluster).name == flow.UNCHANGED


def test_wrong_input_fails_the_flow_run_in_one_line(config: Path, prefect_api: None, tmp_path: Path) -> None:
    state = flow.nightly({"problem": "x"}, return_state=True)
    assert state.is_failed()
    assert "config: methods: Field required; correct it" in state.message
    (config.parent / "ckpt" / "step-1.safetensors").unlink()
    state = fire(config, tmp_path / "store")
    assert "matches nothing; correct the pattern" in state.message
    assert not (tmp_path / "store").exists()


def test_text_of_an_example_is_text_in_the_table() -> None:
    shown = nightly_told.plain("<img src=x onerror=alert(1)>\n[a](javascript:1) | `b` **c**", None)
    assert shown == r"&lt;img src=x onerror=alert\(1\)&gt; \[a\]\(javascript\:1\) \| \`b\` \*\*c\*\*"
    assert len(nightly_told.plain("x" * 500)) == nightly_told.LONGEST_TEXT


def test_a_secret_in_a_training_text_is_masked_before_marks_are_escaped_or_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "correct-horse_battery.staple-and-so-on-and-on")
    shown = nightly_told.plain("psql https://me:hunter2@host correct-horse_battery.staple-and-so-on-and-on").replace("\\", "")
    assert shown == "psql https://***@host ***"


def test_the_command_needs_a_server_that_stays_and_says_how_to_have_one(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults=[PREFECT_API_URL]):
        assert cli.status(["nightly", str(config)]) == cli.BAD_INPUT
    printed = capsys.readouterr().err
    assert "prefect server start" in printed
    assert printed.count("\n") == 1
