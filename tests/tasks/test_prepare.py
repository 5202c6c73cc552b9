"""A fingerprint changes with everything that determines the numbers, and with nothing else."""

from pathlib import Path

import pytest

from tasks.plan import Plan
from tests.tasks.jobs import planned


def made(plan: Plan) -> list[str]:
    return [scored.directions.url for scored in plan.first.scores.methods]


@pytest.mark.parametrize(
    ("override", "factors", "directions", "run"),
    [
        ("cluster.workers=1", True, True, True),
        ("methods.2.damping=0.5", True, False, False),
        ("query_block=5", True, False, False),
        ("self_influence=false", True, True, False),
        ("batch_size=1", False, False, False),
        ("shard_size=3", False, False, False),
        ('dtype="float32"', False, False, False),
        ('exclude=["0"]', False, False, False),
        ("problem_options={seed=9}", False, False, False),
        ("problem_options={queries=4}", False, False, False),
    ],
)
def test_what_is_shared_with_a_run_that_differs_in_one_thing(
    tmp_path: Path, override: str, factors: bool, directions: bool, run: bool
) -> None:
    one, other = (planned(tmp_path / "config", f"{tmp_path}/store", *overrides) for overrides in ((), (override,)))
    assert (one.first.fits["exact"].url == other.first.fits["exact"].url) is factors
    assert (made(one) == made(other)) is directions
    assert (one.fingerprint == other.fingerprint) is run


def test_the_seed_enters_only_where_labels_are_drawn(tmp_path: Path) -> None:
    url = planned(tmp_path / "config", f"{tmp_path}/store").first.subject.checkpoint
    one, other = (planned(tmp_path / "config", f"{tmp_path}/store", f"checkpoint={url}", f"seed={seed}") for seed in (0, 1))
    assert one.first.fits["exact"].url == other.first.fits["exact"].url
    assert one.first.fits["sampled"].url != other.first.fits["sampled"].url
    assert one.fingerprint != other.fingerprint


def test_where_a_file_lies_does_not_matter(tmp_path: Path) -> None:
    one, other = (planned(tmp_path / name, f"{tmp_path}/{name}-store") for name in ("a", "b"))
    assert one.fingerprint == other.fingerprint
    assert one.first.subject != other.first.subject


def test_a_method_that_changes_leaves_the_directions_of_the_others(tmp_path: Path) -> None:
    one, other = (planned(tmp_path / "config", f"{tmp_path}/store", *overrides) for overrides in ((), ("methods.2.damping=0.5",)))
    assert [a == b for a, b in zip(made(one), made(other), strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    ("method", "override", "spectra", "directions"),
    [
        ('name = "ggn"', "methods.0.damping=0.5", True, False),
        ('name = "ggn"', 'methods.0.memory_limit="1GiB"', True, True),
        ('name = "ggn"', "shard_size=3", True, True),
        ('name = "trak"\nprojection_dim = 4', "methods.0.damping=0.5", True, False),
        ('name = "trak"\nprojection_dim = 4', "shard_size=3", False, False),
        ('name = "cg"\ndamping = 0.1', 'methods.0.fisher="exact"', True, True),
        ('name = "cg"\ndamping = 0.1', "methods.0.tolerance=0.01", True, False),
        ('name = "cg"\ndamping = 0.1', "seed=1", True, True),
        ('name = "sni"\ndamping = 0.1', "seed=1", True, False),
        ('name = "sni"\ndamping = 0.1\nbatch_size = "full"', "seed=1", True, True),
        ('name = "astra"\nfisher = "exact"\ndamping = 0.1', "seed=1", True, True),
        ('name = "astra"\nfisher = "exact"\ndamping = 0.1\nschedule = "paper"', "seed=1", True, False),
    ],
)
def test_what_determines_nothing_costs_no_second_solve(tmp_path: Path, method: str, override: str, spectra: bool, directions: bool) -> None:
    text = f'problem = "tiny.py:Tiny"\nshard_size = 6\n[[methods]]\n{method}\n'
    url = planned(tmp_path / "config", f"{tmp_path}/store", text=text).first.subject.checkpoint
    one, other = (
        planned(tmp_path / "config", f"{tmp_path}/store", f"checkpoint={url}", *overrides, text=text) for overrides in ((), (override,))
    )
    assert ([job.url for job in one.first.fits.values()] == [job.url for job in other.first.fits.values()]) is spectra
    assert (made(one) == made(other)) is directions


def test_a_run_is_resumed_under_its_own_labels_only(tmp_path: Path) -> None:
    one, other = (planned(tmp_path / "config", f"{tmp_path}/store", *overrides) for overrides in ((), ('methods.2.label="mine"',)))
    assert one.fingerprint != other.fingerprint


def test_a_method_that_is_added_leaves_the_blocks_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tda.sizes.SHARED_BYTES", 1 << 12)
    text = 'problem = "tiny.py:Tiny"\n[[methods]]\nname = "cg"\ndamping = 0.1\n'
    one = planned(tmp_path / "config", f"{tmp_path}/store", text=text)
    other = planned(tmp_path / "config", f"{tmp_path}/store", text=text + '[[methods]]\nname = "graddot"\n')
    assert made(one)[0] == made(other)[0]
    assert one.first.scores.methods[0].directions.block < 5


def test_a_label_is_no_part_of_what_determines_directions(tmp_path: Path) -> None:
    one, other = (planned(tmp_path / "config", f"{tmp_path}/store", *overrides) for overrides in ((), ('methods.2.label="mine"',)))
    assert made(one) == made(other)
