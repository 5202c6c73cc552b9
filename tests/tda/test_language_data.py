"""Text and tokens in files become the same examples; packing loses nothing; what cannot be used is refused by its place."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import zarr

from tda import InputError, checkpoint
from tda.data import digest
from tda.measurements import sequence_log_odds
from tests.tda import language_models as tiny

PAIRS = [
    {"prompt": "the cat eats", "completion": "fish"},
    {"prompt": "a dog", "completion": "sees the cat"},
    {"prompt": "", "completion": "the dog"},
]


def examples(problem, split="train"):
    data = problem.train_data() if split == "train" else problem.query_data()
    return [(inputs["input_ids"].tolist(), target.tolist()) for inputs, target in data]


def same(problem, other):
    digests = {digest(each, each.train_data(), "train")[0] for each in (problem, other)}
    return len(digests) == 1 and examples(problem) == examples(other)


def shifted(ids, masked=0):
    """Labels of a document whose first tokens are not predicted."""
    return [*(-100 if t < masked else i for t, i in enumerate(ids)), -100][1:]


def parquet(file, records):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as write

    write.write_table(pa.Table.from_pylist(records), file)
    return str(file)


def saved(folder, records):
    """What Dataset.save_to_disk leaves: Arrow streams, and state.json with their order."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir()
    table, files = pa.Table.from_pylist(records), [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for n, name in enumerate(files):
        part = table.slice(3 * n, 3 if n == 0 else None)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def tokens(url, texts, *, flat=False, labels=None, lengths=True):
    """A group of tokens as ids; rows are padded with a token that must never be seen."""
    rows = [tiny.ids_of(text) if isinstance(text, str) else text for text in texts]
    group = zarr.open_group(url, mode="w", zarr_format=3)
    widest = max(map(len, rows))
    array = np.concatenate(rows) if flat else np.array([row + [999] * (widest - len(row)) for row in rows])
    group.create_array("tokens", data=array.astype(np.uint16), chunks=(2, *array.shape[1:]))
    if lengths:
        group.create_array("lengths", data=np.array([len(row) for row in rows]))
    if labels is not None:
        group.create_array("labels", data=np.array(labels))
    return str(url)


def test_a_text_gives_its_tokens_and_each_is_asked_for_the_next(tmp_path):
    problem = tiny.causal(tmp_path)
    assert examples(problem) == [(ids, shifted(ids)) for ids in map(tiny.ids_of, tiny.TEXTS)]
    assert problem.describe("train", 1) == tiny.TEXTS[1]
    assert problem.tokens([3, 5]) == ["the", "cat"]
    assert examples(tiny.causal(tmp_path, end=True))[0] == ([3, 5, 8, 9, 2], [5, 8, 9, 2, -100])


def test_a_prompt_is_read_and_not_predicted(tmp_path):
    problem = tiny.causal(tmp_path, train=PAIRS, end=True)
    wanted = [tiny.ids_of(" ".join([pair["prompt"], pair["completion"], "<end>"])) for pair in PAIRS]
    assert examples(problem) == [(ids, shifted(ids, len(tiny.ids_of(pair["prompt"])))) for ids, pair in zip(wanted, PAIRS, strict=True)]
    assert problem.describe("train", 0) == {"prompt": "the cat eats", "completion": "fish <end>"}


def test_lines_parquet_datasets_and_zarr_give_the_same_examples(tmp_path):
    texts = [{"text": text} for text in tiny.TEXTS]
    ids = [{"input_ids": tiny.ids_of(text)} for text in tiny.TEXTS]
    whole = tiny.causal(tmp_path)
    others = [
        parquet(tmp_path / "a.parquet", texts),
        parquet(tmp_path / "b.parquet", ids),
        saved(tmp_path / "c", texts),
        saved(tmp_path / "d", ids),
        tokens(tmp_path / "e.zarr", tiny.TEXTS),
        tokens(tmp_path / "f.zarr", tiny.TEXTS, flat=True),
        tiny.lines(tmp_path / "g.jsonl", ids),
    ]
    for other in others:
        assert same(whole, tiny.causal(tmp_path, train=other)), other


def test_masked_labels_are_the_same_from_a_prompt_from_records_and_from_zarr(tmp_path):
    whole = tiny.causal(tmp_path, train=PAIRS)
    ids = [tiny.ids_of(f"{pair['prompt']} {pair['completion']}") for pair in PAIRS]
    labels = [[-100] * len(tiny.ids_of(pair["prompt"])) + tiny.ids_of(pair["completion"]) for pair in PAIRS]
    records = [{"input_ids": i, "labels": each} for i, each in zip(ids, labels, strict=True)]
    widest = max(map(len, ids))
    padded = [each + [7] * (widest - len(each)) for each in labels]
    others = (
        tiny.lines(tmp_path / "a.jsonl", records),
        parquet(tmp_path / "a.parquet", records),
        tokens(tmp_path / "a.zarr", ids, labels=padded),
        tokens(tmp_path / "b.zarr", ids, flat=True, labels=np.concatenate(labels)),
    )
    for other in others:
        assert same(whole, tiny.causal(tmp_path, train=other)), other


def test_tokens_and_weights_on_object_storage_are_those_on_a_disk(tmp_path, moto_s3):
    folder = tokens(tmp_path / "a.zarr", tiny.TEXTS)
    from s3fs import S3FileSystem

    S3FileSystem().put(folder, f"{moto_s3.removeprefix('s3://')}/a.zarr", recursive=True)
    assert same(tiny.causal(tmp_path), tiny.causal(tmp_path, train=f"{moto_s3}/a.zarr"))
    shards = tiny.save(tmp_path / "shards", "GPT-2", max_shard_size="1KB")
    S3FileSystem().put(str(shards), f"{moto_s3.removeprefix('s3://')}/shards", recursive=True)
    found, wanted = (checkpoint.read(url) for url in (f"{moto_s3}/shards", f"file://{shards}"))
    assert found.keys() == wanted.keys()
    assert checkpoint.digest(found) == checkpoint.digest(wanted)


def test_rows_of_full_width_need_no_lengths_and_are_read_across_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("tda.language.documents.WINDOW", 4)
    rows = [[3 + (i + t) % 7 for t in range(3)] for i in range(9)]
    problem = tiny.causal(tmp_path, train=tokens(tmp_path / "a.zarr", rows, lengths=False))
    assert examples(problem) == [(row, shifted(row)) for row in rows]
    packed = tiny.causal(tmp_path, train=tokens(tmp_path / "b.zarr", rows, lengths=False), packing=True, max_length=7)
    assert [i for ids, _ in examples(packed) for i in ids][:26] == [i for row in rows for i in row][:26]


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 7, 12])
@pytest.mark.parametrize("source", ["jsonl", "zarr"])
def test_packing_predicts_every_token_but_the_first_once_from_the_one_before(tmp_path, limit, source):
    data = tiny.lines(tmp_path / "a.jsonl", tiny.TEXTS) if source == "jsonl" else tokens(tmp_path / "a.zarr", tiny.TEXTS)
    stream = [i for text in tiny.TEXTS for i in tiny.ids_of(text)]
    found = examples(tiny.causal(tmp_path, train=data, packing=True, max_length=limit))
    assert all(len(ids) == limit for ids, _ in found[:-1])
    assert 0 < len(found[-1][0]) <= limit
    inputs = [i for ids, _ in found for i in ids]
    assert inputs == stream[: len(inputs)]
    assert len(inputs) >= len(stream) - 1
    pairs = [(i, label) for ids, labels in found for i, label in zip(ids, labels, strict=True) if label != -100]
    assert pairs == list(pairwise(stream))


def test_packing_keeps_prompts_masked_and_does_not_pack_queries(tmp_path):
    problem = tiny.causal(tmp_path, train=PAIRS, query=PAIRS[::2], packing=True, max_length=4)
    assert len(problem.query_data()) == 2
    asked = [label for _, labels in examples(problem) for label in labels if label != -100]
    assert asked == [i for pair in PAIRS for i in tiny.ids_of(pair["completion"])]


def test_classes_are_numbers_or_the_models_names(tmp_path):
    problem = tiny.classifier(tmp_path)
    named = [{"text": text, "label": f"LABEL_{i % 2}"} for i, text in enumerate(tiny.TEXTS)]
    others = (
        tiny.lines(tmp_path / "n.jsonl", named),
        tokens(tmp_path / "a.zarr", tiny.TEXTS, labels=[i % 2 for i in range(len(tiny.TEXTS))]),
    )
    for other in others:
        assert same(problem, type(problem)(str(tmp_path / "model"), other, other))
    data = tiny.lines(tmp_path / "n.jsonl", [{"text": "the cat", "label": 2}])
    wrong = type(problem)(str(tmp_path / "model"), data, data)
    with pytest.raises(InputError, match=r"train example 0 \(n\.jsonl, line 1\): label is 2; it must be one of the model's 2 classes"):
        wrong.train_data()


def test_log_odds_are_those_of_the_whole_completion():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([[-100, 1, 2, -100], [-100, -100, 3, -100], [4, 0, 1, 2]])
    p = torch.stack(
        [
            torch.stack([row.softmax(-1)[t, k] for t, k in enumerate(labels) if k >= 0]).prod()
            for row, labels in zip(logits, targets, strict=True)
        ]
    )
    torch.testing.assert_close(sequence_log_odds(logits, targets), (p / (1 - p)).log(), rtol=1e-12, atol=1e-12)
    surer = 40.0 * torch.nn.functional.one_hot(targets.clamp(min=0), 5).double()
    assert torch.isfinite(sequence_log_odds(surer, targets)).all()


# What is refused, or noted.


def read(folder, **options):
    """Every example of both splits."""
    problem = tiny.causal(folder, **options)
    return [data[i] for data in (problem.train_data(), problem.query_data()) for i in range(len(data))]


def refused(folder, said, **options):
    with pytest.raises(InputError, match=said) as error:
        read(folder, **options)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(tmp_path):
    other = tiny.save_tokenizer(tmp_path / "other", (*tiny.WORDS, "mouse"))
    refused(tmp_path, rf"tokenizer {other} has tokens up to 12 \('mouse'\), and the model's embedding has 0\.\.11", tokenizer=str(other))
    refused(
        tmp_path,
        r"train example 1 \(train\.jsonl, line 2\) has the token 12, and the model's embedding has tokens 0\.\.11",
        train=[{"input_ids": [3, 4]}, {"input_ids": [3, 12]}],
    )
    refused(tmp_path, "tokenizer .* has neither", tokenizer=str(tmp_path))


def test_text_without_a_tokenizer_is_refused_and_tokens_need_none(tmp_path):
    tiny.save(tmp_path / "model", "GPT-2", tokenizer=False)
    refused(tmp_path, "there is no tokenizer")
    ids = [{"input_ids": tiny.ids_of(text)} for text in tiny.TEXTS]
    problem = tiny.causal(tmp_path, train=ids, query=ids)
    assert problem.describe("train", 2) == "3 6"
    assert problem.tokens([3]) == ["3"]


def test_what_is_longer_than_the_positions_is_refused_or_cut(tmp_path):
    long = ["the cat", " ".join(["the"] * 13)]
    refused(
        tmp_path, r"train example 1 \(train\.jsonl, line 2\) has 13 tokens, and an example may have 12; set truncate = true", train=long
    )
    refused(tmp_path, "max_length = 13 is more than the 12 positions", max_length=13)
    refused(tmp_path, "max_length must be at least 2", max_length=1)
    assert examples(tiny.causal(tmp_path, train=long, truncate=True))[1] == ([3] * 12, [3] * 11 + [-100])
    assert [len(ids) for ids, _ in examples(tiny.causal(tmp_path, train=long, packing=True))] == [12, 3]


def test_packing_without_any_limit_is_refused(tmp_path):
    tiny.save(tmp_path / "model", "BLOOM")
    refused(tmp_path, "packing needs max_length", packing=True)


def test_empty_documents_are_refused_by_name(tmp_path):
    refused(tmp_path, r"train example 1 \(train\.jsonl, line 2\) is an empty document", train=["the cat", "  ", "the dog"])
    refused(tmp_path, r"query example 0 \(query\.jsonl, line 1\) is an empty document", query=[{"prompt": "", "completion": ""}], end=True)
    refused(tmp_path, r"train example 1 \(a\.zarr\) is an empty document", train=tokens(tmp_path / "a.zarr", [[3, 4], [], [5]]))
    refused(tmp_path, "holds no document", train=[])


def test_training_examples_whose_labels_are_all_masked_count_0_and_are_noted_and_such_queries_are_refused(tmp_path):
    silent = [PAIRS[0], {"prompt": "the cat", "completion": ""}, PAIRS[1], {"input_ids": [3, 4], "labels": [-100, -100]}]
    problem = tiny.causal(tmp_path, train=silent)
    assert problem.notes() == ("2 training examples have no labelled token, so their scores are 0: 1, 3",)
    assert tiny.causal(tmp_path).notes() == ()
    from tda.modules import inspect
    from tests.tda.pipeline import attribute

    attributed = inspect(problem, problem.model(), problem.train_data())
    methods = [{"name": name} for name in ("graddot", "gradcos")] + [{"name": "ekfac", "fisher": "empirical", "damping": 1e-3}]
    scores = attribute(problem, methods, attributed=attributed).influence
    assert torch.isfinite(scores).all()
    assert (scores[:, :, [1, 3]] == 0).all()
    assert (scores[:, :, [0, 2]] != 0).all()
    refused(tmp_path, r"query example 1 \(query\.jsonl, line 2\) has no labelled token", query=silent)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"story": "the cat"}, r"train example 0 \(train\.jsonl, line 1\) has no field 'text'; it has story"),
        ({"text": 3}, "field 'text' is int, not text"),
        ({"completion": "fish"}, "has no field 'prompt'"),
        ({"input_ids": [3, 4], "labels": [3]}, "has 2 input_ids and 1 labels"),
        ({"input_ids": "3 4"}, "must be lists of whole numbers"),
    ],
)
def test_records_without_what_is_needed_are_refused_by_place(tmp_path, record, said):
    refused(tmp_path, said, train=[record])


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\nthe dog\n')
    (tmp_path / "b.jsonl").write_text("[1]\n")
    (tmp_path / "c.parquet").write_text("nothing")
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "dataset_dict.json").write_text("{}")
    (tmp_path / "several" / "train").mkdir()
    zarr.open_group(tmp_path / "d.zarr", mode="w").create_array("words", data=np.zeros(3))
    said = {
        "a.jsonl": "line 2 is not JSON",
        "b.jsonl": "line 1 is a JSON list",
        "c.parquet": "is not a whole Parquet file|needs pyarrow",
        "several": "name one of .*several/train",
        "model": "it has no state.json",
        "d.zarr": "no array `tokens` of whole numbers.*it has words",
        "none.jsonl": "do not exist",
        "none.zarr": "do not exist",
        "none": "does not exist",
    }
    for name, each in said.items():
        refused(tmp_path, each, train=str(tmp_path / name))


def test_lengths_and_labels_that_do_not_fit_the_tokens_are_refused(tmp_path):
    url = tokens(tmp_path / "a.zarr", tiny.TEXTS, labels=[1, 2])
    refused(tmp_path, r"labels are of shape \(2,\), and should be \(5, 7\)", train=url)
    zarr.open_group(url)["lengths"][1] = 99
    refused(tmp_path, "lengths do not fit tokens", train=url)


def test_options_that_mean_nothing_are_refused(tmp_path):
    refused(tmp_path, 'measurement must be "loss" or "log_odds"', measurement="margin")
    refused(tmp_path, "epochs must be at least 0", epochs=-1)
    with pytest.raises(InputError, match='measurement must be "loss" or "margin"'):
        tiny.classifier(tmp_path, measurement="log_odds")
