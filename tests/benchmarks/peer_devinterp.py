"""Time devinterp's sample() on a fixed case; run it inside the peers' own virtual environment.

    python -m tests.benchmarks.peer_devinterp --case mlp --chains 1 --draws 20 --threads 1

From the repository's root. Prints one JSON line: seconds and processor seconds of a whole call of `sample`, its Zarr store included, less
those of a call with 2 draws (so that what it does once is left out), and the draws that they stand for.

Their observables are batches of one size, that of a step, and what does not fill a batch is left out: of the digits 1,408 + 320 examples
are evaluated, 4% fewer than by ours. A custom loss is their way to models that are no language models; it is given example numbers.
"""

import importlib.util
import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1", TQDM_DISABLE="1")

# A torchvision that does not fit torch, as package indexes serve it beside a CPU build, stops transformers; nothing here needs one.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.startswith("torchvision") else find_spec(name, package)

import torch
from datasets import Dataset, fingerprint
from devinterp.slt.sampling import sample
from torch import Tensor, nn

from tests.benchmarks import sampled


def pieces(name: str) -> tuple[nn.Module, Dataset, Dataset, Any]:
    """Model, both splits as their data sets, and the loss (None is that of a language model)."""
    case = sampled.load(name)
    if name != "mlp":
        splits = [torch.cat([x, y[:, -1:]], 1) for x, y in (case.train, case.query)]
        return case.model, *(dataset(ids) for ids in splits), None
    inputs, targets = (torch.cat(pair) for pair in zip(case.train, case.query, strict=True))
    edge, stop = len(case.train[0]), len(inputs)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        chosen = ids[:, 0]
        return nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen], reduction="none")[:, None]

    numbers = torch.stack([torch.arange(stop), torch.zeros(stop, dtype=torch.int64)], 1)
    return case.model, dataset(numbers[:edge]), dataset(numbers[edge:]), loss


def dataset(ids: Tensor) -> Dataset:
    """Rows of numbers as a data set of theirs."""
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def main() -> None:
    """Measure and print."""
    options = sampled.arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Their data sets name themselves by pickling what made them, which fails on some versions of Python; no file is cached here.
    fingerprint.Hasher.hash = classmethod(lambda _, value: str(abs(hash(repr(value)[:2000]))))
    if options.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    model, train, query, loss = pieces(options.case)
    step_size, n_beta, localization, batch = sampled.SETTINGS[options.case]

    def run(draws: int) -> tuple[float, float]:
        folder = tempfile.mkdtemp(dir=parent)
        wall, processor = time.perf_counter(), time.process_time()
        sample(
            model,
            train,
            {"train": (train, len(train) // batch), "query": (query, len(query) // batch)},
            lr=step_size,
            n_beta=n_beta,
            localization=localization,
            num_chains=options.chains,
            num_draws=draws,
            batch_size=batch,
            num_init_loss_batches=1,
            device="cpu",
            output_path=Path(folder) / f"{draws}",
            loss_fn=loss,
        )
        return time.perf_counter() - wall, time.process_time() - processor

    with tempfile.TemporaryDirectory() as parent:
        found = sampled.per_run(run, options.draws, options.repeats)
    found["draws"] = options.draws * options.chains
    print(json.dumps(found))


if __name__ == "__main__":
    main()
