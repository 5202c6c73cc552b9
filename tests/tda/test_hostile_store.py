"""A store may hold anything: nothing in it is unpickled, leaves the store, or takes all memory; one line says what is wrong."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numcodecs import Zstd

import tda
from tda import location
from tda.errors import InputError
from tda.read_store import LARGEST, unpacked
from tests.stored_run import write_run

ROOT = Path(__file__).parents[2]
SOURCES = [file for top in ("flows", "infra", "tasks", "tda") for file in (ROOT / top).rglob("*.py")]


@pytest.fixture
def run(tmp_path):
    write_run(f"{tmp_path}/store")
    return tmp_path / "store"


def edited(file, **changes):
    """Change keys of a JSON file, and of the copy of it that stands in the group's own metadata."""
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, **changes}))
    group = file.parents[1] / "zarr.json"
    whole = json.loads(group.read_text())
    if file.parent.name in whole.get("consolidated_metadata", {}).get("metadata", {}):
        whole["consolidated_metadata"]["metadata"][file.parent.name].update(changes)
        group.write_text(json.dumps(whole))


def test_no_source_unpickles_anything():
    forbidden = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.partition(".")[0] for name in names}, file
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called != "torch.load" or options.get("weights_only") == "True", file
                assert options.get("allow_pickle", "False") == "False", file
                assert called not in ("yaml.load", "eval", "exec", "pd.read_pickle"), file


def test_templates_escape_all_texts_and_only_our_styles_are_taken_as_they_are():
    for template in (ROOT / "tasks").glob("*.j2"):
        text = template.read_text()
        assert not re.search(r"\|\s*safe|autoescape false|Markup", text), template
    for file in (ROOT / "tasks").glob("*.py"):
        text = file.read_text()
        assert text.count("Environment(") - text.count("autoescape=True") == 0, file
        assert re.findall(r"Markup\((\w*)", text) in ([], ["style"]), file


@pytest.mark.parametrize("name", ["../x", "..", "../../etc", "/etc", "a/../../b", "", "a\0b"])
def test_a_run_id_never_leads_out_of_its_store(run, name):
    with pytest.raises(InputError) as caught:
        tda.open_run(run, name or "\0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hostile", ["../../../../etc", "/etc/passwd", "..", 7, None])
def test_references_in_manifests_never_lead_out_of_their_store(run, hostile):
    file = next(run.glob("runs/*/run.json"))
    manifest = json.loads(file.read_text())
    manifest["fingerprints"] = {"factors": {"x": hostile}, "trajectories": {"x": hostile}, "fits": {"ekfac": {"x": hostile}}}
    manifest["stages"] = {str(hostile): {"shape": {"train": 1}}}
    manifest["artifacts"] = [hostile]
    manifest["checksums"] = {"sha256": ""}
    file.write_text(json.dumps(manifest))
    evaluation = {"schema_version": 1, "folder": hostile, "retraining": "x"}
    (file.parent / "evaluation.json").write_text(json.dumps(evaluation))
    opened = tda.open_run(run)
    from tasks.verify import check

    for look in (lambda: opened.factors, lambda: opened.influence_on(str(hostile)), lambda: opened.evaluation, lambda: check(opened)):
        with pytest.raises((InputError, AttributeError)) as caught:
            look()
        assert "\n" not in str(caught.value)


def test_names_in_checksums_never_lead_out_of_their_folder(run):
    from tda import checksums

    url = f"file://{run}/sums.json"
    (run / "sums.json").write_text(json.dumps(checksums.signed({"objects": {"../../etc/passwd": [1, "00"]}})))
    with pytest.raises(InputError, match="cannot be a name below"):
        checksums.read(url)


@pytest.mark.parametrize(("shape", "chunks"), [([10**15], [10**15]), ([10**15], [1000])])
def test_a_coordinate_of_enormous_length_is_refused_before_it_is_read(run, shape, chunks):
    for name in ("train", "train_label", "train_loss"):
        file = next(run.glob(f"runs/*/results.zarr/{name}/zarr.json"))
        edited(file, shape=shape, chunk_grid={"name": "regular", "configuration": {"chunk_shape": chunks}})
    with pytest.raises(InputError, match=r"bytes at a time; the store is damaged"):
        tda.open_run(run).influence  # noqa: B018


def test_an_enormous_chunk_is_refused_before_it_is_read(run):
    file = next(run.glob("runs/*/results.zarr/influence/zarr.json"))
    shape = json.loads(file.read_text())["shape"]
    edited(file, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [*shape[:2], 10**13]}})
    with pytest.raises(InputError, match=r"bytes at a time; the store is damaged"):
        tda.open_run(run).influence  # noqa: B018


def test_another_codec_is_refused(run):
    file = next(run.glob("runs/*/results.zarr/influence/zarr.json"))
    edited(file, codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip", "configuration": {"level": 1}}])
    with pytest.raises(InputError, match="is packed with GzipCodec"):
        tda.open_run(run).influence  # noqa: B018


def test_an_array_of_objects_is_refused(run):
    file = next(run.glob("runs/*/results.zarr/influence/zarr.json"))
    edited(file, data_type="object")
    with pytest.raises((InputError, ValueError)) as caught:
        tda.open_run(run).influence  # noqa: B018
    assert "object" in str(caught.value)


@pytest.mark.parametrize("claimed", [2**43, 2**63, LARGEST + 1])
def test_a_chunk_that_claims_to_unpack_to_terabytes_is_refused_unread(run, claimed):
    chunk = next(run.glob("runs/*/results.zarr/influence/c/0/0/0"))
    chunk.write_bytes(b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + claimed.to_bytes(8, "little") + chunk.read_bytes()[9:])
    with pytest.raises(InputError, match=r"chunk influence/c/0/0/0 says that it unpacks to [0-9,]+ bytes") as caught:
        tda.open_run(run).influence.values  # noqa: B018
    assert "\n" not in str(caught.value)


def test_the_size_in_a_frame_is_read_as_zstandard_writes_it():
    for count in (1, 100, 255, 256, 257, 65_791, 65_792, 70_000, 5_000_000):
        assert unpacked(Zstd(level=1).encode(np.zeros(count, np.uint8))[:18]) == count


@pytest.mark.parametrize("name", ["run.json", "evaluation.json"])
def test_a_manifest_from_the_future_is_refused_by_every_reader(run, name):
    folder = next(run.glob("runs/*"))
    held = json.loads((folder / name).read_text()) if (folder / name).exists() else {"folder": "x", "retraining": "y"}
    (folder / name).write_text(json.dumps({**held, "schema_version": 99}))
    with pytest.raises(InputError, match="upgrade tda to open it"):
        tda.open_run(run).evaluation  # noqa: B018


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(InputError, match="cannot be a name below"):
        location.join("file:///store", 5)
