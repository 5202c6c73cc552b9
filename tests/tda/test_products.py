"""Products in bfloat16 accumulate in float32, and oneDNN is used only where it keeps float32."""

import pytest
import torch

from tda.curvature.fit import fit_factors
from tda.directions import query_gradients
from tda.likelihoods import Categorical
from tda.methods import EKFAC
from tda.modules import inspect
from tda.products import fast_float32, matmul, onednn_keeps_float32
from tda.scoring import Scorer, score
from tests import cases
from tests.tda.pipeline import Given


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("inner", [64, 16384])
def test_bfloat16_products_lose_only_the_rounding_of_their_factors_however_long_the_sums(inner):
    torch.manual_seed(0)
    a, b = torch.randn(32, inner), torch.randn(inner, 16)
    assert error(matmul(a, b, "bfloat16"), a.double() @ b.double()) < 6e-3
    assert matmul(a, b, "bfloat16").dtype == torch.float32


def test_fast_float32_is_as_accurate_as_float32_and_leaves_the_setting_as_it_was():
    torch.manual_seed(1)
    a, b = torch.randn(200, 700), torch.randn(700, 100)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_float32():
        found = a @ b
    assert error(found, a.double() @ b.double()) < 2e-6
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert isinstance(onednn_keeps_float32(), bool)


def scores(problem, products):
    train, queries, method = problem.train_data(), problem.query_data(), EKFAC(fisher="exact", damping=1e-3)
    attributed = inspect(problem, problem.model(), train)
    factors = fit_factors(attributed, train, fisher="exact", batch_size=256, products=products)
    gradients, _ = query_gradients(attributed, queries, range(len(queries)), batch_size=64)
    directions = [method.direction(b, f, g, products) for b, f, g in zip(attributed.blocks, factors, gradients, strict=True)]
    scorer = Scorer(method.title, directions, torch.ones(len(queries)), method.own([factors]))
    return score(attributed, [scorer], train, range(len(train)), examples=len(train), batch_size=256, products=products).influence


def test_scores_from_bfloat16_products_stay_near_those_in_float32():
    case = cases.load_case("d", torch.float32)
    queries = list(zip(case.query_inputs[:40], case.query_targets[:40], strict=True))
    problem = Given(case.model, Categorical(), list(zip(case.train_inputs, case.train_targets, strict=True)), queries)
    assert 1e-5 < error(scores(problem, "bfloat16"), scores(problem, "full").double()) < 0.05
