"""Secrets reach neither a configuration, nor a manifest, nor a message."""

from datetime import UTC, datetime
from uuid import uuid4

import pytest

from flows import command_nightly, secrets
from flows.cli import status
from flows.config import load_config
from flows.deployment import Deployed, Nightly
from tda.errors import InputError
from tests.flows.runs import CONFIG, write_config


@pytest.mark.parametrize(
    "key",
    ["password", "db_password", "api_key", "token", "hf_token", "AUTH_TOKEN", "access_key", "secret", "secretKey", "aws_access_key_id"],
)
def test_an_option_that_is_named_like_a_secret_is_refused_without_its_value(tmp_path, key):
    config = write_config(tmp_path, CONFIG.replace("shard_size", f'problem_options = {{source = {{{key} = "hunter2"}}}}\nshard_size'))
    with pytest.raises(InputError, match=f"problem_options.source.{key} looks like a secret.*os.environ") as caught:
        load_config(config)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["pad_token", "eos_token", "tokens", "max_tokens", "tokenizer", "keys", "secretary"])
def test_options_of_language_models_are_no_secrets(key):
    assert secrets.refuse({key: "value"}) is None, "nothing was raised"


def test_a_list_of_secrets_is_none_the_less_one():
    with pytest.raises(ValueError, match=r"passwords\.secret looks like a secret"):
        secrets.refuse({"passwords": {"secret": ["hunter2"]}})


def test_a_password_that_holds_an_at_sign_is_masked_whole():
    assert secrets.masked("see http://me:hunter2@ss@host/api, http://host:80/a@b") == "see http://***@host/api, http://host:80/a@b"


def test_the_command_nightly_prints_the_server_without_its_password(capsys):
    deployed = Deployed(uuid4(), "tda", "process", pool_was_there=True, next=datetime.now(UTC), replaced="")
    wanted = Nightly("digits", {"store": "file:///s", "checkpoint": None}, "", "", "0 2 * * *", "UTC", "tda")
    command_nightly._tell(wanted, deployed, "http://me:hunter2@host/api", "")
    said = capsys.readouterr().out
    assert said.count("http://***@host/api") == 2
    assert "hunter2" not in said


def test_a_url_with_a_password_is_refused_wherever_it_stands(tmp_path):
    text = CONFIG.replace("shard_size", 'problem_options = {source = ["postgres://me:hunter2@host/db"]}\nshard_size')
    with pytest.raises(InputError, match=r"problem_options.source.0 is a URL with a password") as caught:
        load_config(write_config(tmp_path, text))
    assert "hunter2" not in str(caught.value)


def test_what_an_error_quotes_is_shown_without_passwords(tmp_path, capsys):
    problem = """
    import tda
    class Tiny(tda.Problem):
        likelihood = tda.Categorical()
        def __init__(self):
            raise tda.InputError("cannot connect to postgres://me:hunter2@host/db")
        def model(self): ...
        def train_data(self): ...
        def query_data(self): ...
    """
    config = write_config(tmp_path, CONFIG, problem)
    assert status(["run", str(config), "--store", f"{tmp_path}/store"]) == 2
    said = capsys.readouterr().err
    assert "postgres://***@host/db" in said
    assert "hunter2" not in said
