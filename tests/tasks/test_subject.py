"""What a worker opens is what the run was planned with, held once."""

from dataclasses import replace
from pathlib import Path

import pytest

from tasks import subject
from tasks.subject import Subject, open_subject
from tda.errors import InputError
from tda.problem import problem_digest
from tests.flows.runs import PROBLEM, write_config


@pytest.fixture
def tiny(tmp_path: Path) -> Subject:
    write_config(tmp_path)
    return Subject(f"{tmp_path}/tiny.py:Tiny", "{}", "", ("*",), (), "auto")


def test_a_worker_with_another_source_than_the_plans_refuses(tiny: Subject, tmp_path: Path) -> None:
    planned = replace(tiny, source=problem_digest(tiny.problem, {}))
    open_subject(planned)
    (tmp_path / "tiny.py").write_text(PROBLEM.replace("nn.Tanh()", "nn.ReLU()"))
    open_subject.cache_clear()
    with pytest.raises(InputError, match="is not the one that the run was planned with"):
        open_subject(planned)


def test_warming_imports_and_opens_nothing(tiny: Subject, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(PROBLEM.replace("def model(self):", "def model(self):\n        print('opened')"))
    open_subject.cache_clear()
    subject.warm(tiny)
    assert open_subject.cache_info().currsize == 0
    subject.warm(replace(tiny, problem="no.such:Problem"))


def test_a_process_holds_one_subject(tiny: Subject) -> None:
    for seed in range(3):
        open_subject(replace(tiny, options=f'{{"seed": {seed}}}'))
    assert open_subject.cache_info().currsize == 1
