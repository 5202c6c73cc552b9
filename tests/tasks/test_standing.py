"""What a process stands for is found without opening anything, and tells versions and problems apart."""

from pathlib import Path

import pytest
import torch

from tasks.standing import standing
from tda.errors import InputError
from tests.flows.runs import PROBLEM


def test_a_process_says_what_it_would_compute_with_and_opens_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = f"{tmp_path}/tiny.py:Tiny"
    (tmp_path / "tiny.py").write_text(PROBLEM.replace("def model(self):", "def model(self):\n        print('opened')"))
    first = standing(problem, "{}")
    assert capsys.readouterr().out == ""
    assert first["torch"] == torch.__version__
    assert standing(problem, '{"examples": 5}') != first
    (tmp_path / "tiny.py").write_text(PROBLEM)
    assert standing(problem, "{}") != first
    with pytest.raises(InputError, match=r"importing no\.such failed"):
        standing("no.such:Problem", "{}")
