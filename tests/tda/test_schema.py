import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tda import location, schema
from tda.errors import InputError
from tests.stored_run import write_run


@pytest.fixture
def group(tmp_path):
    group = location.open_group(f"file://{tmp_path}/x.zarr", "w")
    group.attrs["schema_version"] = schema.SCHEMA_VERSION
    return group


@pytest.mark.parametrize("name", sorted(schema.SPECS))
def test_every_registered_array_can_be_stored_and_found_valid(group, name):
    spec = schema.SPECS[name]
    for dtype in spec.dtypes:
        array = schema.create_array(group, f"{dtype}/{name}", [3] * len(spec.dims), dtype=dtype)
        assert array.metadata.dimension_names == spec.dims
        assert array.attrs["meaning"] == spec.meaning
        assert array.attrs["units"] == spec.units
        schema.validate(group, [f"{dtype}/{name}"])


def test_scores_say_their_sign_units_and_what_the_writer_adds(group):
    array = schema.create_array(group, "influence", (2, 4, 6), (1, 2, 3), {"damping": {"ekfac": 0.1}})
    assert array.attrs["sign"].startswith("influence[q, i] = d f_q / d eps_i")
    assert "nats" in array.attrs["units"]
    assert array.attrs["damping"] == {"ekfac": 0.1}
    assert array.chunks == (1, 2, 3)


def test_scores_that_were_never_written_read_as_nan(group):
    schema.create_array(group, "influence", (1, 2, 6), (1, 2, 3))[0, 0:2, 0:3] = 1
    found = group["influence"][...]
    assert np.isnan(found[..., 3:]).all()
    assert not np.isnan(found[..., :3]).any()


def test_a_damaged_chunk_fails_to_read(tmp_path, group):
    schema.create_array(group, "train_loss", (1000,))[:] = np.random.default_rng(0).normal(size=1000)
    chunk = tmp_path / "x.zarr/train_loss/c/0"
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(RuntimeError, match="Zstd"):
        group["train_loss"][:]


@pytest.mark.parametrize(
    ("name", "shape", "chunks", "dtype"),
    [
        ("scores", (3,), None, None),
        ("influence", (3, 3), None, None),
        ("influence", (3, 3, 3), (3, 3), None),
        ("influence", (3, 3, 3), (0, 3, 3), None),
        ("influence", (3, 3, 3), None, "float64"),
        ("eigenvalues", (1, 3, 3), None, "float16"),
    ],
)
def test_what_does_not_suit_its_spec_is_never_created(group, name, shape, chunks, dtype):
    with pytest.raises(ValueError, match=name):
        schema.create_array(group, name, shape, chunks, dtype=dtype)
    assert list(group.array_keys()) == []


def test_an_array_is_created_once(group):
    schema.create_array(group, "train_loss", (3,))
    with pytest.raises(zarr.errors.ContainsArrayError):
        schema.create_array(group, "train_loss", (3,))


def test_an_absent_array_is_named(group):
    with pytest.raises(InputError, match="no array 'influence'"):
        schema.validate(group, ["influence"])


def test_foreign_dims_are_refused(group):
    group.create_array("train_loss", shape=(3,), dtype="float32", dimension_names=["query"])
    with pytest.raises(InputError, match=r"'train_loss' has the dims \('query',\), expected \('train',\)"):
        schema.validate(group, ["train_loss"])


def test_a_foreign_dtype_is_refused(group):
    group.create_array("train_loss", shape=(3,), dtype="float16", dimension_names=["train"])
    with pytest.raises(InputError, match="'train_loss' is float16, expected float32"):
        schema.validate(group, ["train_loss"])


def test_one_dim_has_one_length(group):
    schema.create_array(group, "train_loss", (3,))
    schema.create_array(group, "influence", (1, 2, 4))
    with pytest.raises(InputError, match="has 4 along 'train' and 'train_loss' has 3"):
        schema.validate(group, ["train_loss", "influence"])


def test_layers_may_differ_in_length(group):
    for index in (1, 2):
        schema.create_array(group, f"layers/{index}/kfac_in", (1, index))
    schema.validate(group, ["layers/1/kfac_in", "layers/2/kfac_in"])


@given(version=st.integers(min_value=schema.SCHEMA_VERSION + 1))
def test_every_newer_version_is_refused_with_the_way_out(version):
    with pytest.raises(InputError, match=f"schema_version {version}.*upgrade tda"):
        schema.check_version({"schema_version": version}, "store")


@pytest.mark.parametrize("attrs", [{}, {"schema_version": "1"}, {"schema_version": None}])
def test_what_states_no_version_is_refused(attrs):
    with pytest.raises(InputError, match="not written by tda"):
        schema.check_version(attrs, "store")


def test_a_group_of_a_newer_version_is_refused(group):
    schema.create_array(group, "train_loss", (3,))
    group.attrs["schema_version"] = schema.SCHEMA_VERSION + 1
    with pytest.raises(InputError, match="upgrade tda"):
        schema.validate(group, ["train_loss"])


def test_a_whole_run_suits_the_registry(tmp_path):
    group = location.open_group(write_run(tmp_path) + "/results.zarr")
    schema.validate(group, group.array_keys())
