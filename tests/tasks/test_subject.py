"""What a worker opens is what the run was planned with, held once."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import subject
from tasks.subject import Subject, forget, open_subject
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
    forget()
    with pytest.raises(InputError, match="is not the one that the run was planned with"):
        open_subject(planned)


def test_a_process_makes_a_model_once_however_many_shards_ask_for_it(
    tiny: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.py").write_text(PROBLEM.replace("def model(self):", "def model(self):\n        print('made')"))
    forget()
    assert len({id(open_subject(tiny)) for _ in range(5)}) == 1
    assert capsys.readouterr().out == "made\n"


def test_a_process_holds_one_problem_and_a_few_of_its_checkpoints(tiny: Subject) -> None:
    first = weakref.ref(open_subject(tiny).attributed.problem)
    many = [weakref.ref(open_subject(replace(tiny, exclude=("0",) * n)).attributed.model) for n in range(1, 22)]
    gc.collect()
    assert first() is not None
    assert sum(model() is not None for model in many) == subject.OPEN_AT_ONCE
    open_subject(replace(tiny, options='{"seed": 1}'))
    gc.collect()
    assert first() is None
