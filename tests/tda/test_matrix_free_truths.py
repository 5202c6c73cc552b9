"""Where the curvature is too large to form, products of it alone reach the stored truths, in float64 to 1e-6."""

import pytest
import torch

from tda import Categorical
from tda.curvature.fit import fit_factors
from tda.directions import query_gradients
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tda.scoring import Scorer, score
from tests import cases
from tests.tda.pipeline import Given

QUERIES = 8


@pytest.mark.parametrize(
    ("truth", "options"),
    [
        ("hess_d2", {"name": "cg", "curvature": "hessian", "damping": 0.01, "preconditioner": "ekfac"}),
        ("ggn_d2", {"name": "cg", "damping": 0.01, "preconditioner": "ekfac"}),
        pytest.param("ggn_d2", {"name": "astra", "damping": 0.01}, marks=pytest.mark.soak),
        pytest.param("ggn_fix", {"name": "cg", "damping": "fix", "max_steps": 5000}, marks=pytest.mark.soak),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_solves_without_a_matrix_reach_the_stored_truths_of_a_wide_network(truth, options):
    case = cases.load_case("D", torch.float64)
    pairs = [list(zip(*each, strict=True)) for each in ((case.train_inputs, case.train_targets), (case.query_inputs, case.query_targets))]
    train, queries = pairs[0], pairs[1][:QUERIES]
    attributed = inspect(Given(case.model, Categorical(), train, queries), case.model, train)
    damping = case.fix_damping if options["damping"] == "fix" else options["damping"]
    method = parse({**options, "damping": damping, "fisher": "exact", "tolerance": 1e-9})
    factors = tuple(fit_factors(attributed, train, fisher="exact", batch_size=512))
    gradients, _ = query_gradients(attributed, queries, range(QUERIES), batch_size=QUERIES)
    made = method.directions(Work(attributed, train, [factors], 0, 2048), gradients)
    assert all(made.told["solves"][0]["converged"])
    scorer = Scorer(method.title, made.passes[0], torch.ones(QUERIES))
    found = score(attributed, [scorer], train, range(len(train)), examples=len(train), batch_size=512, self_influence=False).influence[0]
    assert float((found - case.truth[truth]).abs().max() / case.truth[truth].abs().max()) < 1e-6
