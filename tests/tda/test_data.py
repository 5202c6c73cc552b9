"""Examples are loaded by id, whatever their collation; their digest is of their values; what is wrong is said in one line."""

from collections import UserDict

import numpy as np
import pytest
import torch

from tda import Categorical, InputError
from tda.data import batches, digest, length, load_batch
from tests.tda.pipeline import Given


def examples(size=7):
    return [(torch.arange(3.0) + i, i % 2) for i in range(size)]


def problem(train=None, collate=None):
    found = Given(None, Categorical(), examples() if train is None else train)
    if collate:
        found.collate = collate
    return found


def load(train, ids=(0, 1), collate=None):
    return load_batch(problem(train, collate), train, ids, dtype=torch.float64)


def refused(call, *args, **options):
    with pytest.raises(InputError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_batch_holds_the_examples_asked_for_in_the_dtype_asked_for():
    batch = load(examples(), [5, 2])
    assert torch.equal(batch.inputs, torch.tensor([[5.0, 6, 7], [2, 3, 4]]).double())
    assert batch.targets.tolist() == [1, 0]
    assert batch.targets.dtype == torch.int64


def test_inputs_may_be_nested_and_only_real_numbers_are_cast():
    train = [({"ids": torch.arange(2), "x": (torch.ones(1), np.float32(2))}, torch.tensor(0.5)) for _ in range(2)]
    inputs, targets = load(train)
    assert inputs["ids"].dtype == torch.int64
    assert inputs["x"][0].dtype == inputs["x"][1].dtype == targets.dtype == torch.float64


def test_a_collation_of_the_problems_own_is_used():
    def collate(items):
        return torch.stack([x for x, _ in items]), [y for _, y in items]

    assert load(examples(), [1, 2, 3], collate).targets.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "train",
    [
        [torch.zeros(3)] * 3,
        [(torch.zeros(3),)] * 3,
        [(torch.zeros(3), 0, 0)] * 3,
        [{"input_ids": torch.zeros(3), "labels": 0}] * 3,
        [(torch.zeros(3), "cat")] * 3,
        [(torch.zeros(3), 0), (torch.zeros(4), 0)],
    ],
    ids=["no targets", "one thing", "three things", "a dictionary", "words for targets", "ragged"],
)
def test_examples_that_are_not_inputs_and_targets_are_refused(train):
    said = refused(load, train)
    assert said.startswith("examples 0..1 cannot be collated as (inputs, targets): ")
    assert "dataset[i] must return (inputs, targets), or define Problem.collate" in said


def test_what_a_dataset_raises_is_passed_on_for_it_is_nothing_that_the_user_typed():
    class Broken:
        def __getitem__(self, i):
            raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        load(Broken())


def test_batches_cover_the_ids_in_order():
    assert [list(b) for b in batches(range(3, 10), 3)] == [[3, 4, 5], [6, 7, 8], [9]]
    assert list(batches([], 3)) == []


def test_the_digest_is_of_values_and_order_and_not_of_batches():
    def of(train, **options):
        return digest(problem(train), train, "train", **options)[0]

    one = of(examples())
    assert of(examples()) == one
    assert of(examples()[::-1]) != one
    assert of(examples(6)) != one
    assert of([(x, 1 - y) for x, y in examples()]) != one
    assert of([(x + 1e-6, y) for x, y in examples()]) != one


def test_the_labels_are_given_where_every_example_has_an_integer():
    train = examples()
    assert digest(problem(train), train, "train", size=3)[1].tolist() == [0, 1, 0, 1, 0, 1, 0]
    real = [(x, float(y)) for x, y in train]
    assert digest(problem(real), real, "train")[1] is None
    tokens = [(x, torch.tensor([y, y])) for x, y in train]
    assert digest(problem(tokens), tokens, "train")[1] is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_by_example(value):
    train = examples()
    train[4] = (train[4][0] * value, 0)
    assert "query example 4 has inputs or targets that are NaN or infinite" in refused(digest, problem(train), train, "query", size=3)


def test_targets_that_are_not_finite_are_refused_by_example():
    train = [(x, torch.tensor(torch.nan if i == 5 else 0.0)) for i, (x, _) in enumerate(examples())]
    assert "train example 5 has inputs or targets" in refused(digest, problem(train), train, "train", size=3)


def test_a_value_shared_by_a_batch_may_be_anything():
    def collate(items):
        return {"x": torch.stack([x for x, _ in items]), "scale": torch.tensor(2.0), "name": "digits"}, torch.tensor([y for _, y in items])

    train = examples()
    assert digest(problem(train, collate), train, "train", size=3)[0]


def test_an_empty_dataset_is_refused():
    assert "train_data() is empty" in refused(length, [], "train")
    assert "query_data() is empty" in refused(digest, problem([]), [], "query")


def test_a_stream_is_refused():
    said = refused(length, iter(examples()), "train")
    assert "train_data() must be map-style with a length, got list_iterator; wrap it in a list" in said


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict."""


def encoded(items):
    return Encoding(ids=torch.stack([x for x, _ in items]), more=[Encoding(x=torch.ones(1, dtype=torch.float32))]), [y for _, y in items]


def test_any_mapping_of_inputs_becomes_a_dict_and_is_cast():
    inputs = load(examples(), collate=encoded).inputs
    assert type(inputs) is dict
    assert inputs["ids"].dtype == torch.float64
    assert type(inputs["more"][0]) is dict
    assert inputs["more"][0]["x"].dtype == torch.float64


def arrays(change):
    """Inputs of 2,000 numbers as an array, of which printing shows six; the one in the middle is changed."""

    def collate(items):
        values = np.arange(2000)
        values[1000] += change
        return {"x": values}, [y for _, y in items]

    return collate


def named(first, second):
    return lambda items: ({first: torch.ones(len(items)), second: torch.zeros(len(items))}, [y for _, y in items])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (arrays(0), arrays(1)),
        (named("a", "b"), named("b", "a")),
        (encoded, lambda items: (Encoding(ids=torch.stack([x for x, _ in items]) + 1, more=[]), [y for _, y in items])),
        (lambda items: (np.float32(1), [0] * len(items)), lambda items: (np.float64(1), [0] * len(items))),
        (lambda items: ("1", [0] * len(items)), lambda items: (1, [0] * len(items))),
    ],
    ids=["the middle of an array", "names", "a mapping", "dtypes", "text and number"],
)
def test_the_digest_sees_whatever_inputs_hold(one, other):
    train = examples()
    first, second = (digest(problem(train, collate), train, "train")[0] for collate in (one, other))
    assert first != second
    assert first == digest(problem(train, one), train, "train")[0]


@pytest.mark.parametrize("leaf", [object(), {1, 2}, np.array([object()])])
def test_inputs_whose_content_cannot_be_told_are_refused(leaf):
    train = examples()
    said = refused(digest, problem(train, lambda items: ([leaf], [y for _, y in items])), train, "train")
    assert f"train examples 0..0 hold a {type(leaf).__name__}, whose content cannot be told apart" in said


def test_examples_that_change_when_they_are_read_again_are_refused():
    class Augmented(list):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return (x + torch.rand(()) if i == 6 else x), y

    train = Augmented(examples())
    assert "query example 6 differs when it is read again; switch random augmentation off" in refused(
        digest, problem(train), train, "query"
    )


def test_every_target_is_checked_and_the_first_that_is_wrong_is_named():
    train = examples(1200)
    for wrong in (1150, 1180):
        train[wrong] = (train[wrong][0], -100)
    outputs = torch.zeros(2)
    said = refused(
        digest, problem(train), train, "train", check=lambda targets: Categorical().check(outputs.expand(len(targets), -1), targets)
    )
    assert said == "train example 1150: target -100 is out of range: the model has classes 0..1"
