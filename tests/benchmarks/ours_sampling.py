"""Time our chains on a fixed case, as peer_devinterp.py times devinterp's.

    python -m tests.benchmarks.ours_sampling --case mlp --chains 8 --draws 20 --threads 1

From the repository's root. Prints one JSON line: seconds and processor seconds of chains from their start to the last byte in Zarr, less
those with 2 draws, the draws that they stand for, and `warm_up`, the seconds until chains can start: compilers', with --compiled.
Losses of all train and query examples are kept, of GPTs per token too.
"""

import json
import tempfile
import time
from dataclasses import replace

from torch.utils.data import TensorDataset

import tda
from tasks import layout
from tda import location
from tda.modules import inspect
from tda.sampling.chains import landscape, start
from tda.sampling.options import Sampling
from tda.sampling.recording import Recorder
from tda.sampling.stored import chunk_examples
from tests.benchmarks import sampled


class Case(tda.Problem):
    """One case."""

    def __init__(self, name: str) -> None:
        self.case, self.tokens = sampled.load(name), name != "mlp"
        self.likelihood = tda.TokenCategorical() if self.tokens else tda.Categorical()
        if self.tokens:
            self.predict = lambda model, batch: model(batch.inputs, return_dict=False, use_cache=False)[0]

    def model(self):
        return self.case.model

    def train_data(self):
        return TensorDataset(*self.case.train)

    def query_data(self):
        return TensorDataset(*self.case.query)


def main() -> None:
    """Measure and print."""
    options = sampled.arguments()
    problem = Case(options.case)
    attributed = inspect(problem, problem.model(), problem.train_data())
    step_size, n_beta, localization, batch = sampled.SETTINGS[options.case]

    def sampling(draws: int) -> Sampling:
        return Sampling(
            step_size=step_size,
            n_beta=n_beta,
            localization=localization,
            batch_size=batch,
            chains=options.chains,
            together=options.chains,
            draws=draws,
            burn_in=0,
            compiled=options.compiled,
        )

    began = time.perf_counter()
    shared = landscape(attributed, sampling(1), problem.train_data())
    recorder = Recorder(attributed, shared, problem.train_data(), problem.query_data(), tokens=problem.tokens)
    warm_up = time.perf_counter() - began

    def run(draws: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            wall, processor = time.perf_counter(), time.process_time()
            recorder.landscape = replace(shared, sampling=sampling(draws))
            group = location.open_group(folder, "a")
            state = start(recorder.landscape, range(options.chains))
            for piece in recorder.landscape.sampling.pieces:
                state, recorded = recorder.record(state, piece)
                for name, value in vars(recorded).items():
                    if value is not None and name != "batch_loss":
                        rows = (options.chains, min(recorder.landscape.sampling.segment, draws))
                        chunk = min(value.shape[2], chunk_examples(options.chains, draws, *value.shape[3:4])) if value.ndim > 2 else 0
                        shape = (options.chains, draws, *value.shape[2:])
                        layout.ensure_array(group, name, shape, (*rows, *((chunk,) if chunk else ()), *value.shape[3:]))
                        group[name][:, piece.draws.start : piece.draws.stop] = value.numpy()
            return time.perf_counter() - wall, time.process_time() - processor

    found = sampled.per_run(run, options.draws, options.repeats)
    print(json.dumps(found | {"draws": options.draws * options.chains, "how": shared.how, "warm_up": warm_up}))


if __name__ == "__main__":
    main()
