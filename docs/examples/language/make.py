"""Writes the data of language.toml and candidates.toml, the same every time: who lives where and works as what.

With a model's configuration, a tokenizer, and a sentence encoder of random weights: by it, texts are near that share words.

python docs/examples/language/make.py FOLDER
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPTNeoXConfig, PreTrainedTokenizerFast
from transformers.utils import logging

NAMES = [
    "Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea", "Max", "Nia", "Ole", "Pia", "Quin", "Rosa", "Sven",
    "Tom", "Uma", "Vera", "Will", "Yara",
]  # fmt: skip
TOWNS = ["Bergen", "Cadiz", "Dover", "Eger", "Faro", "Genoa"]
WORK = ["baker", "carpenter", "doctor", "farmer", "painter", "teacher"]
#: Ways to state a fact. A question has the words of the first.
LIVES = ("{name} lives in {town}", "the home of {name} is {town}", "in {town} you will find {name}")
WORKS = ("{name} works as a {work}", "the job of {name} is {work}", "ask {name} to be your {work}")
#: A tokenizer's special tokens.
SPECIAL = ("<pad>", "<unk>", "<end>")


def main(folder: Path) -> None:
    """Write train.jsonl, query.jsonl, and the folders of the model and of the encoder."""
    generator = random.Random(0)  # noqa: S311
    facts = [{"name": name, "town": generator.choice(TOWNS), "work": generator.choice(WORK)} for name in NAMES]
    told = [(way, fact) for fact in facts for way in (*LIVES, *WORKS)]
    generator.shuffle(told)
    write(folder / "train.jsonl", [{"text": way.format(**fact)} for way, fact in told])
    asked = [(way[0].rpartition(" ")[0], what, fact) for way, what in ((LIVES, "town"), (WORKS, "work")) for fact in facts[:12]]
    write(folder / "query.jsonl", [{"prompt": way.format(**fact), "completion": fact[what]} for way, what, fact in asked])
    words = sorted({word for way, fact in told for word in way.format(**fact).split()})
    save(folder / "model", [*SPECIAL, *words])
    save_encoder(folder / "encoder", [*SPECIAL, *words])


def write(file: Path, records: list[dict[str, str]]) -> None:
    """One JSON object per line."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def save(folder: Path, vocabulary: list[str]) -> None:
    """config.json of a small GPT-NeoX, and a tokenizer of whole words."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15}
    config = GPTNeoXConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **size, **ends)
    config.save_pretrained(folder)
    save_tokenizer(folder, vocabulary)


def save_encoder(folder: Path, vocabulary: list[str]) -> None:
    """A small BERT with random weights, as sentence-transformers saves it: its hidden states are averaged over the tokens."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    model = BertModel(BertConfig(vocab_size=len(vocabulary), pad_token_id=0, **size), add_pooling_layer=False)
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for weight in (each for each in model.parameters() if each.ndim == 2):
            weight.copy_(torch.from_numpy(generator.integers(-64, 65, weight.shape) / 64))  # exact, so the same on every machine
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    save_tokenizer(folder, vocabulary)
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{name}"} for i, (path, name) in enumerate(parts.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}))


def save_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(("pad_token", "unk_token", "eos_token"), SPECIAL, strict=True)))
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
