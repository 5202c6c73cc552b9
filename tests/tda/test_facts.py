"""The made-up facts are what they say: gold documents state what is asked, nothing else does, and a model can learn them."""

import pytest
import torch

from tda import InputError
from tda.problems.facts import RELATIONS, FactCorpus, FactQuestions, answered, cloze

TINY = {"persons": 6, "countries": 2, "objects": 6, "paraphrases": 3, "distractors": 2, "width": 32, "heads": 2}


def test_gold_documents_state_what_is_asked_and_no_others_do():
    problem = FactCorpus(**TINY)
    for query, fact in enumerate(problem.world.facts[i] for i in problem.asked):
        gold = problem.gold(query)
        ways = {way.format(s=fact.subject, o=fact.object) + " ." for way in RELATIONS[fact.relation][1]}
        assert {problem.world.documents[i] for i in gold} <= ways
        assert len(gold) == 3
        assert not ways & {text for i, text in enumerate(problem.world.documents) if i not in gold}


def test_distractors_share_a_subject_or_an_object_with_facts_and_are_gold_for_none():
    world = FactCorpus(**TINY).world
    strays = [text.split() for text, fact in zip(world.documents, world.states, strict=True) if fact < 0]
    assert len(strays) == 2 * 8  # of each subject
    objects = {fact.object for fact in world.facts}
    for words in strays:
        (subject,) = {fact.subject for fact in world.facts} & set(words)
        own = {fact.object for fact in world.facts if fact.subject == subject}
        assert not own & set(words)
    assert any(objects & set(words) for words in strays)


def test_what_is_asked_was_not_taught_and_both_stages_ask_it():
    before, after = FactCorpus(**TINY), FactQuestions(**TINY)
    world = after.world
    assert not {world.facts[i].subject for i in world.taught} & {world.facts[i].subject for i in world.asked}
    assert sorted(world.taught + world.asked) == list(range(len(world.facts)))
    assert before.query_data() == after.query_data()
    assert [before.gold(q) for q in range(3)] == [after.gold(q) for q in range(3)]
    # The words alone of the answers are asked.
    inputs, targets = after.query_data()[0]
    assert (targets != -100).sum() == 1
    assert targets[-2] == inputs["input_ids"][-1] == world.place[world.facts[world.asked[0]].object]


def test_a_world_follows_from_its_seed():
    assert FactCorpus(**TINY).world.documents == FactQuestions(**TINY).world.documents
    assert FactCorpus(**TINY, data_seed=1).world.documents != FactCorpus(**TINY).world.documents


def test_a_model_learns_the_facts_and_fine_tuning_teaches_it_to_answer():
    shallow = {**TINY, "depth": 1, "distractors": 0}
    before, after = FactCorpus(**shallow, epochs=200, learning_rate=6e-3), FactQuestions(**shallow, epochs=100, learning_rate=6e-3)
    torch.manual_seed(0)
    model = before.model()
    before.fit(model, before.train_data(), seed=0, on_checkpoint=lambda **_: None)
    assert answered(before, model, cloze(before)).float().mean() > 0.95
    assert answered(after, model, after.train_data()).float().mean() < 0.5
    after.fit(model, after.train_data(), seed=0, on_checkpoint=lambda **_: None)
    assert answered(after, model, after.train_data()).float().mean() > 0.95


def test_cloze_documents_end_with_their_objects():
    problem = FactCorpus(**TINY)
    objects = {fact.object for fact in problem.world.facts}
    texts = cloze(problem)
    assert len(texts) == 3 * len(problem.world.facts)  # the fourth and fifth way alone end otherwise
    assert {text.split()[-1] for text in texts.texts} <= objects
    assert [int((texts[i][1] != -100).sum()) for i in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"persons": 1}, "persons must be in 2"),
        ({"paraphrases": 6}, "paraphrases must be in 1..5, got 6"),
        ({"width": 30, "heads": 4}, "width must be a multiple of 2 x heads"),
        ({"queries": 1000}, "queries must be in 1..84"),
    ],
)
def test_options_that_do_not_go_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        FactCorpus(**options)


def test_queries_are_spread_over_the_facts():
    world = FactCorpus(queries=8).world
    relations = {world.facts[i].relation for i in FactCorpus(queries=8).asked}
    assert len(relations) > 2
    assert FactQuestions(queries=8).describe("query", 0) == {
        "prompt": world.question(world.asked[0]),
        "completion": world.facts[world.asked[0]].object,
    }
