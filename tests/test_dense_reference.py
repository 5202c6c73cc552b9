"""The dense reference is right: it matches the fixed truths, closed forms, and its own hooks match autograd."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from tests import cases, dense
from tests.dense import Block


def cross_entropy(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="none")


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().flatten(1).sum(1)


def binary(outputs, targets):
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def examples(size, shape, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    return list(zip(inputs, torch.randint(0, classes, (size,), generator=generator), strict=True))


def network(*layers):
    torch.manual_seed(1)
    model = nn.Sequential(*layers).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def case_d():
    return cases.load_case("d")


@pytest.mark.parametrize(("fisher", "labels"), [("emp", dense.data_label), ("exp", dense.categorical_labels)])
def test_the_reference_equals_the_fixed_truths_and_the_plain_gradient_product_does_not(case_d, fisher, labels):
    train = zip(case_d.train_inputs, case_d.train_targets, strict=True)
    queries = zip(case_d.query_inputs[:8], case_d.query_targets[:8], strict=True)
    blocks = [Block("linear", (f"fc{i}",)) for i in range(3)]
    passes = dense.record(case_d.model, cases.loss, train, queries, blocks, labels=labels)
    graddot = dense.influence(passes, blocks, "graddot")
    assert relative(graddot, case_d.truth["graddot"]) < 1e-12

    dampings = {"heur": "heuristic", "fix": case_d.fix_damping, "d2": 0.01}
    for method in ("ekfac", "kfac"):
        curvatures = {block: dense.curvature(passes, block, method) for block in blocks}
        for name, damping in dampings.items():
            truth = case_d.truth.get(f"{method}_{fisher}_{name}")
            if truth is None:
                assert (method, name) == ("kfac", "heur")
                continue
            found = sum(dense.scores(passes, b, dense.inverse(C, dense.damping_value(C, b, damping))) for b, C in curvatures.items())
            assert relative(found, truth) < 1e-9
            assert relative(graddot, truth) > 0.5


class Twice(nn.Module):
    """One linear layer called twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.inner(torch.tanh(self.inner(x))))


class Tied(nn.Module):
    """Two linear layers that share their weight and have biases of their own: only the shared weight has structure here."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


LAYERS = {
    "linear": (lambda: network(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), (6,), [("linear", "0"), ("linear", "2")]),
    "linear over tokens": (lambda: network(nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 3)), (5, 6), [("linear", "0")]),
    "in-place activation": (lambda: network(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), (6,), [("linear", "0")]),
    "transformers Conv1D": (lambda: network(Conv1D(4, 6), nn.Flatten(), nn.Linear(20, 3)), (5, 6), [("transposed", "0")]),
    "called twice": (lambda: Twice().double().eval(), (5,), [("linear", "inner"), ("linear", "out")]),
    "conv1d": (lambda: network(nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(16, 3)), (2, 7), [("conv", "0")]),
    "conv2d dilated": (lambda: network(nn.Conv2d(2, 3, (3, 2), dilation=2, bias=False), nn.Flatten()), (2, 5, 4), [("conv", "0")]),
    "conv2d same": (lambda: network(nn.Conv2d(2, 3, (2, 3), padding="same"), nn.Flatten()), (2, 4, 3), [("conv", "0")]),
    "conv2d valid": (lambda: network(nn.Conv2d(2, 3, 2, padding="valid"), nn.Flatten()), (2, 4, 3), [("conv", "0")]),
}
for _mode, _groups in itertools.product(("zeros", "reflect", "replicate", "circular"), (1, 2)):

    def _conv(mode=_mode, groups=_groups):
        return network(nn.Conv2d(4, 6, 3, stride=(1, 2), padding=(1, 2), padding_mode=mode, groups=groups), nn.Flatten())

    LAYERS[f"conv2d {_mode} groups={_groups}"] = (_conv, (4, 4, 5), [("conv", "0", g) for g in range(_groups)])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_recorded_by_hooks_multiply_to_the_gradient_that_autograd_gives(name):
    build, shape, described = LAYERS[name]
    model = build()
    blocks = [Block(kind, (module,), *group) for kind, module, *group in described]
    passes = dense.record(model, cross_entropy, examples(4, shape, 3), [], blocks)
    for one, block in itertools.product(passes.data, blocks):
        product = dense.output_gradients(model, block, one).T @ dense.activations(model, block, one)
        torch.testing.assert_close(product, dense.gradient(model, block, one), rtol=1e-12, atol=1e-13)


def test_modules_that_share_a_weight_form_one_block():
    torch.manual_seed(0)
    model, block = Tied().double().eval(), Block("linear", ("first", "second"))
    (one,) = dense.record(model, cross_entropy, examples(1, (4,), 4), [], [block]).data
    product = dense.output_gradients(model, block, one).T @ dense.activations(model, block, one)
    torch.testing.assert_close(product, dense.gradient(model, block, one), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_is_a_linear_layer_on_one_hot_inputs_whose_basis_is_the_identity(padding):
    model = network(nn.Embedding(7, 4, padding_idx=padding), nn.Flatten(), nn.Linear(20, 3))
    block = Block("embedding", ("0",))
    train = [(torch.randint(0, 7, (5,), generator=torch.Generator().manual_seed(i)), torch.tensor(i % 3)) for i in range(6)]
    passes = dense.record(model, cross_entropy, train, [], [block])
    for one in passes.data:
        product = dense.output_gradients(model, block, one).T @ dense.activations(model, block, one)
        torch.testing.assert_close(product, dense.gradient(model, block, one), rtol=1e-12, atol=1e-13)
    A = dense.factors(passes, block)[1]
    assert torch.equal(A, torch.diag(torch.diagonal(A)))
    assert torch.equal(dense.eigenbasis(passes, block)[1], torch.eye(7, dtype=torch.float64))


def output_hessian(likelihood, outputs):
    if likelihood == "gaussian":
        return torch.eye(outputs.numel(), dtype=outputs.dtype)
    p = torch.sigmoid(outputs[0]) if likelihood == "bernoulli" else outputs[0].softmax(-1)
    return torch.diag(p * (1 - p)) if likelihood == "bernoulli" else torch.diag(p) - torch.outer(p, p)


@pytest.mark.parametrize(
    ("likelihood", "labels", "loss"),
    [
        ("categorical", dense.categorical_labels, cross_entropy),
        ("gaussian", dense.gaussian_labels, half_square),
        ("bernoulli", dense.bernoulli_labels, binary),
    ],
)
def test_the_exact_fisher_is_the_generalised_gauss_newton_matrix(likelihood, labels, loss):
    model = network(nn.Linear(4, 3))
    train = examples(7, (4,), 3)
    if likelihood != "categorical":
        train = [(x, torch.eye(3, dtype=torch.float64)[y]) for x, y in train]
    block = Block("full", ("0.weight", "0.bias"))
    passes = dense.record(model, loss, train, [], [block], labels=labels)
    wanted = torch.zeros(15, 15, dtype=torch.float64)
    for x, _ in train:
        jacobian = torch.cat([torch.kron(torch.eye(3, dtype=x.dtype), x[None]), torch.eye(3, dtype=x.dtype)], 1)
        wanted += jacobian.T @ output_hessian(likelihood, model(x[None]).detach()) @ jacobian / len(train)
    assert relative(dense.fisher(passes, block), wanted) < 1e-12


def token_loss(outputs, targets):
    return functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)


def joint_labels(outputs, target):
    """All V^P labellings of the tokens that count, with their joint probabilities."""
    probability = outputs[0].softmax(-1)
    chosen = []
    for labelling in itertools.product(range(outputs.shape[-1]), repeat=outputs.shape[1]):
        label = torch.tensor(labelling)[None]
        weight = torch.prod(probability[torch.arange(len(labelling)), label[0]][target[0] != -100])
        repeats = outputs.shape[-1] ** int((target == -100).sum())
        chosen.append((float(weight) / repeats, torch.where(target == -100, target, label)))
    return chosen


def test_the_exact_expectation_over_tokens_equals_the_sum_over_all_joint_labellings():
    model = network(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    mix = torch.tensor([[1.0, 0.5, 0.2], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]], dtype=torch.float64)
    train = [(x, torch.tensor([i % 3, -100 if i == 1 else 1, 2])) for i, (x, _) in enumerate(examples(4, (3, 4), 3))]
    blocks = [Block("linear", ("0",)), Block("linear", ("2",))]

    def predict(net, x):
        return net[2](mix @ net[1](net[0](x)))  # positions interact

    one_by_one, joint = (
        dense.record(model, token_loss, train, [], blocks, labels=labels, predict=predict) for labels in (dense.token_labels, joint_labels)
    )
    for block in blocks:
        assert relative(dense.fisher(one_by_one, block), dense.fisher(joint, block)) < 1e-12
        assert relative(dense.factors(one_by_one, block)[0], dense.factors(joint, block)[0]) < 1e-12


def test_kfac_is_the_exact_fisher_of_a_deep_linear_network_with_squared_error():
    model = network(nn.Linear(5, 4), nn.Linear(4, 6, bias=False), nn.Linear(6, 3))
    train = [(x, torch.zeros(3, dtype=torch.float64)) for x, _ in examples(20, (5,), 3)]
    blocks = [Block("linear", (name,)) for name in "012"]
    passes = dense.record(model, half_square, train, [], blocks, labels=dense.gaussian_labels)
    for block in blocks:
        assert relative(dense.curvature(passes, block, "kfac"), dense.fisher(passes, block)) < 1e-12


def test_ekfac_is_closer_to_the_fisher_than_kfac_and_diagonal_blocks_keep_its_diagonal():
    model = network(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    diagonal, full = (Block(kind, ("2.weight", "2.bias")) for kind in ("diagonal", "full"))
    linear = Block("linear", ("0",))
    passes = dense.record(model, cross_entropy, examples(30, (5,), 3), [], [linear], labels=dense.categorical_labels)
    exact = dense.fisher(passes, linear)
    error = {method: float((dense.curvature(passes, linear, method) - exact).norm()) for method in ("kfac", "ekfac")}
    assert 0 < error["ekfac"] < error["kfac"]
    F = dense.curvature(passes, full, "ekfac")
    assert F.shape == (8, 8)
    assert torch.equal(dense.curvature(passes, diagonal, "kfac"), torch.diag(torch.diagonal(F)))


def test_masked_positions_leave_the_input_factor_and_drawn_labels_replace_the_datas_in_the_fisher_alone():
    model = network(nn.Linear(4, 3))
    train = [(x, torch.tensor([0, 1, -100])) for x, _ in examples(3, (3, 4), 3)]
    masks = [torch.tensor([True, True, False])] * 3
    drawn = [torch.tensor([2, 2, -100])] * 3
    block = Block("linear", ("0",))
    plain, masked = (dense.record(model, token_loss, train, train, [block], drawn=drawn, masks=m) for m in (None, masks))
    rows = torch.cat([torch.cat([x[:2], torch.ones(2, 1, dtype=x.dtype)], 1) for x, _ in train])
    torch.testing.assert_close(dense.factors(masked, block)[1], rows.T @ rows / 6)
    assert not torch.allclose(dense.factors(plain, block)[1], dense.factors(masked, block)[1])
    relabelled = dense.record(model, token_loss, [(x, drawn[0]) for x, _ in train], [], [block])
    torch.testing.assert_close(dense.fisher(masked, block), dense.fisher(relabelled, block))
    torch.testing.assert_close(dense.gradients(masked, block, "data"), dense.gradients(plain, block, "queries"))


def test_low_damping_does_not_spoil_the_reference():
    model = network(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    blocks = [Block("linear", ("0",)), Block("linear", ("2",))]
    passes = dense.record(model, cross_entropy, examples(40, (6,), 4), examples(3, (6,), 4, seed=1), blocks)
    for block in blocks:
        eigenvalues, U = dense.ekfac_eigenvalues(passes, block)
        damping = 1e-6 * float(eigenvalues.mean())
        in_basis = dense.gradients(passes, block, "queries") @ U, dense.gradients(passes, block, "data") @ U
        wanted = -(in_basis[0] / (eigenvalues + damping)) @ in_basis[1].T / len(passes.data)
        C = dense.curvature(passes, block, "ekfac")
        assert relative(dense.scores(passes, block, dense.inverse(C, damping)), wanted) < 1e-9


def test_an_unknown_method_is_refused():
    model, block = network(nn.Linear(3, 2)), Block("linear", ("0",))
    passes = dense.record(model, cross_entropy, examples(2, (3,), 2), [], [block])
    with pytest.raises(ValueError, match="'kfac', 'ekfac' or 'fisher', got 'sgd'"):
        dense.curvature(passes, block, "sgd")


@pytest.mark.parametrize("name", ["d", "D", "C", "T"])
def test_the_cases_load_with_their_weights_and_truths(name):
    if reason := cases.available(name):
        pytest.skip(reason)
    case = cases.load_case(name)
    assert case.truth["ekfac_emp_fix"].shape == (8, len(case.train_inputs))
    with torch.no_grad():
        losses = cases.loss(case.model(case.query_inputs[:8]), case.query_targets[:8])
    assert losses.shape == (8,)
    assert losses.dtype == torch.float64
    assert torch.isfinite(losses).all()
    if name == "T":
        assert len(cases.tracked_layers(case.model)) == 16
