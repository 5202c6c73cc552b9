"""Folders of tiny language models with random weights, and a tokenizer of whole words: nothing is downloaded."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tda.problems.language import CausalLM, SequenceClassification

WORDS = ("<pad>", "<unk>", "<end>", "the", "a", "cat", "dog", "sees", "eats", "fish", "today", "again")
#: The example texts differ in length, so that batches are padded.
TEXTS = ("the cat eats fish", "a dog sees the cat again", "the dog", "a cat sees a dog today again", "the fish sees")
POSITIONS = 12

_SIZE = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": 2}
_WIDE = {**_SIZE, "intermediate_size": 12, "max_position_embeddings": POSITIONS}
CONFIGS = {
    "GPT-2": GPT2Config(vocab_size=len(WORDS), n_positions=POSITIONS, n_embd=8, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2),
    "GPT-NeoX": GPTNeoXConfig(**_WIDE, tie_word_embeddings=False),
    "BLOOM": BloomConfig(vocab_size=len(WORDS), hidden_size=8, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2, pad_token_id=0),
    "Llama": LlamaConfig(**_WIDE, num_key_value_heads=1, tie_word_embeddings=False),
    "BERT": BertConfig(**_WIDE),
}
CAUSAL = {"GPT-2": GPT2LMHeadModel, "GPT-NeoX": GPTNeoXForCausalLM, "BLOOM": BloomForCausalLM, "Llama": LlamaForCausalLM}
CLASSIFIERS = {
    "GPT-2": GPT2ForSequenceClassification,
    "GPT-NeoX": GPTNeoXForSequenceClassification,
    "BLOOM": BloomForSequenceClassification,
    "Llama": LlamaForSequenceClassification,
    "BERT": BertForSequenceClassification,
}


def drawn(kind, config, seed=0) -> nn.Module:
    """A model whose every parameter is random: biases and norms too, so that none hides behind a 0."""
    torch.manual_seed(seed)
    model = kind(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    model.tie_weights()
    return model.eval()


def save(folder: Path, name: str, kinds=CAUSAL, *, tokenizer=True, **options) -> Path:
    """A folder as save_pretrained writes it, with the tokenizer."""
    drawn(kinds[name], CONFIGS[name]).save_pretrained(folder, **options)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, words=WORDS) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    fast.save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def lines(file: Path, records) -> str:
    """A JSONL file of records, or of texts."""
    file.write_text("".join(json.dumps({"text": each} if isinstance(each, str) else each) + "\n" for each in records))
    return str(file)


def causal(folder: Path, train=TEXTS, query=TEXTS[:2], *, name="GPT-2", **options) -> CausalLM:
    """A problem on a tiny model; `train` and `query` are records or a path."""
    if not (folder / "model").exists():
        save(folder / "model", name)
    paths = [
        data if isinstance(data, str) else lines(folder / f"{split}.jsonl", data) for split, data in (("train", train), ("query", query))
    ]
    return CausalLM(str(folder / "model"), *paths, **options)


def classifier(folder: Path, *, name="BERT", **options) -> SequenceClassification:
    if not (folder / "model").exists():
        save(folder / "model", name, CLASSIFIERS)
    records = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    return SequenceClassification(
        str(folder / "model"), lines(folder / "t.jsonl", records), lines(folder / "q.jsonl", records[:2]), **options
    )
