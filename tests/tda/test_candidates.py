"""The union of candidates, what is drawn, and what of a problem cannot serve."""

import numpy as np
import pytest

import tda
from tda.errors import InputError
from tda.problems.digits import Digits
from tda.problems.language import CausalLM
from tda.retrieval.candidates import Asked, check_counts, drawn, gold, named, texts, union
from tests.tda import language_models as tiny


class Told(Digits):
    """Digits whose training examples are texts."""

    shown: object = "one two"

    def describe(self, split, i):
        return self.shown

    def gold(self, query):
        return [query, 2, query]


def test_a_union_has_every_id_once_with_all_its_sources():
    found = {"bm25": np.array([[5, 2, -1], [0, -1, -1]]), "gold": [[2, 9], []], "random": [[9], [7]]}
    ids, source = union(found)
    assert ids.dtype == np.int64
    assert ids.tolist() == [[2, 5, 9], [0, 7, -1]]
    assert source.tolist() == [[5, 1, 12], [1, 8, 0]]
    assert [named(int(bits)) for bits in source[0]] == ["bm25, gold", "bm25", "gold, random"]


def test_a_query_without_a_candidate_is_refused():
    with pytest.raises(InputError, match="query 1 has no candidate by bm25 and gold; add others"):
        union({"bm25": [[0], [-1]], "gold": [[], []]})


def test_drawn_ids_differ_within_a_query_and_are_its_own():
    each = [drawn(50, 20, 0, query) for query in range(3)]
    assert all(len(set(ids.tolist())) == 20 and ids.min() >= 0 and ids.max() < 50 for ids in each)
    assert np.array_equal(drawn(50, 20, 0, 1), each[1])
    assert len({tuple(sorted(ids)) for ids in (*each, drawn(50, 20, 1, 1))}) == 4
    assert sorted(drawn(5, 5, 0, 0)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("shown", "text"), [("one", "one"), ({"prompt": "one", "completion": "two"}, "one two")])
def test_a_text_is_the_description_where_that_is_text(shown, text):
    problem = Told()
    problem.shown = shown
    assert texts(problem, "train", [0, 3]) == [text, text]


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (np.ones((2, 2)), "train example 3 of Told is no text"),
        ({"image": np.ones(2), "text": "one"}, "is no text"),
        ({}, "is no text"),
        (" \n", "train example 3 of Told is an empty text"),
    ],
)
def test_what_is_no_text_is_refused_by_example(shown, words):
    problem = Told()
    problem.shown = shown
    with pytest.raises(InputError, match=words):
        texts(problem, "train", [3])


def test_gold_ids_are_in_range_each_once():
    assert gold(Told(), 4, 4, "train") == [[0, 2], [1, 2], [2], [2, 3]]
    with pytest.raises(InputError, match=r"Told\.gold\(3\) names example 3 of 'pretraining', which has 3, counted from 0"):
        gold(Told(), 4, 3, "pretraining")
    with pytest.raises(InputError, match=r"Digits\.gold\(0\) names nothing"):
        gold(Digits(), 4, 4, "train")


def test_a_query_s_record_may_name_its_gold(tmp_path):
    told = [{"text": tiny.TEXTS[0], "gold": [3, 1]}, {"text": tiny.TEXTS[1]}]
    assert gold(tiny.causal(tmp_path, query=told), 2, 5, "train") == [[1, 3], []]
    assert tiny.causal(tmp_path).gold(0) is None
    for wrong in (3, [1.5], [True], "3"):
        with pytest.raises(InputError, match=r"query\.jsonl, line 1: gold must be a list of ids of training examples"):
            tiny.causal(tmp_path, query=[{"text": tiny.TEXTS[0], "gold": wrong}]).gold(0)


def test_language_models_say_their_texts_without_special_tokens(tmp_path):
    problem = tiny.causal(tmp_path, query=[{"prompt": "the cat", "completion": "eats fish"}], end=True)
    assert texts(problem, "train", [2]) == ["the dog"]
    assert texts(problem, "query", [0]) == ["the cat eats fish"]
    ids = tiny.causal(tmp_path, train=[{"input_ids": [3, 4]}], query=[{"input_ids": [3, 4]}])
    assert ids.text("train", 0) == "the a"
    bare = CausalLM(
        str(tiny.save(tmp_path / "bare", "GPT-2", tokenizer=False)), *[tiny.lines(tmp_path / "i.jsonl", [{"input_ids": [3]}])] * 2
    )
    assert bare.text("train", 0) is None


def test_no_more_candidates_than_examples():
    check_counts(Asked(bm25=7, random=7), 7)
    for name in ("bm25", "embedding", "random"):
        with pytest.raises(InputError, match=rf"candidates\.{name} = 8 is more than the 7 training examples of 'train'"):
            check_counts(Asked(**{name: 8}), 7)


def test_a_problem_says_that_it_knows_no_gold_by_default():
    assert tda.Problem.gold(Digits(), 0) is None
