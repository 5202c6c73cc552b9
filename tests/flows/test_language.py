"""A configuration that names a language model: its paths, its checkpoint as a folder, and what makes a result another one."""

import json

import pytest
import torch

from flows.attribute import request_of
from flows.config import load_config
from tasks.prepare import examine
from tasks.subject import forget, open_subject
from tda import InputError
from tda.problem import problem_digest
from tests.tda import language_models as tiny

CONFIG = """
problem = "tda.problems.language:CausalLM"
checkpoint = "weights"
dtype = "float64"
modules = ["mlp"]
[problem_options]
checkpoint = "model"
train = "train.jsonl"
query = "query.jsonl"
[[methods]]
name = "graddot"
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A configuration in a folder that is not the current one; the weights lie in shards beside it."""
    folder = tmp_path / "there"
    folder.mkdir()
    tiny.save(folder / "model", "GPT-2")
    tiny.save(folder / "weights", "GPT-2", max_shard_size="1KB", tokenizer=False)
    tiny.lines(folder / "train.jsonl", tiny.TEXTS)
    tiny.lines(folder / "query.jsonl", tiny.TEXTS[:2])
    (folder / "run.toml").write_text(CONFIG)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield folder / "run.toml"
    forget()


def test_paths_are_taken_from_the_configurations_folder_and_weights_from_a_folder_of_shards(config):
    request = request_of(load_config(config))
    inputs = examine(request)
    assert (inputs.examples, inputs.queries) == (len(tiny.TEXTS), 2)
    attributed = open_subject(request.subject).attributed
    assert {name for block in attributed.blocks for name in block.parameters} == {
        f"transformer.h.0.mlp.{layer}.{last}" for layer in ("c_fc", "c_proj") for last in ("weight", "bias")
    }
    truth = tiny.drawn(tiny.CAUSAL["GPT-2"], tiny.CONFIGS["GPT-2"]).state_dict()
    assert all(torch.equal(tensor, truth[key].double()) for key, tensor in attributed.model.state_dict().items())


def test_without_weights_and_without_epochs_there_is_nothing_to_attribute(config):
    request = request_of(load_config(config, ["checkpoint=weights"]))
    examine(request)
    config.write_text(CONFIG.replace('checkpoint = "weights"', ""))
    with pytest.raises(InputError, match="has no fit method and the config no checkpoint"):
        examine(request_of(load_config(config)))
    examine(request_of(load_config(config, ["problem_options.epochs=1"])))


def test_an_edited_config_or_tokenizer_is_another_problem_and_so_are_weights_only_where_they_are_trained_on(config):
    parsed = load_config(config)

    def digests():
        return [problem_digest(parsed.problem, parsed.problem_options | {"epochs": epochs}) for epochs in (0, 1)]

    first = digests()
    assert digests() == first
    weights = config.parent / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    second = digests()
    assert second[0] == first[0]
    assert second[1] != first[1]
    settings = config.parent / "model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"n_head": 4}))
    third = digests()
    assert not set(third) & {*first, *second}


def test_bad_data_end_the_examination_in_one_line(config):
    tiny.lines(config.parent / "train.jsonl", [*tiny.TEXTS, {"input_ids": [3, 99]}])
    with pytest.raises(InputError, match=r"train example 5 \(train\.jsonl, line 6\) has the token 99") as error:
        examine(request_of(load_config(config)))
    assert "\n" not in str(error.value)
