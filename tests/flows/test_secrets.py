"""Secrets reach neither a configuration, nor a manifest, nor a message."""

import pytest

from flows import secrets
from flows.cli import status
from flows.config import load_config
from tda.errors import InputError
from tests.flows.runs import CONFIG, write_config


@pytest.mark.parametrize("key", ["password", "db_password", "api_key", "token", "hf_token", "AUTH_TOKEN", "access_key", "secret"])
def test_an_option_that_is_named_like_a_secret_is_refused_without_its_value(tmp_path, key):
    config = write_config(tmp_path, CONFIG.replace("shard_size", f'problem_options = {{source = {{{key} = "hunter2"}}}}\nshard_size'))
    with pytest.raises(InputError, match=f"problem_options.source.{key} looks like a secret.*os.environ") as caught:
        load_config(config)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["pad_token", "eos_token", "tokens", "max_tokens", "tokenizer", "keys", "secretary"])
def test_options_of_language_models_are_no_secrets(key):
    secrets.refuse({key: "value"})


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
