"""Stages of training that are solved to the last digit, their influence as the library computes it, and as retraining finds it."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, grad, jacrev

from tda.attributed import Attributed
from tda.carried import carry
from tda.curvature.fit import fit_factors
from tda.directions import Dense, query_gradients
from tda.methods.work import Work
from tda.modules import inspect
from tda.scoring import Scorer, score
from tests.tda.pipeline import Given

QUERIES = 3


@dataclass
class Trained:
    """One stage: L(w) = mean_i l_i + (decay/2) ||w||^2 + (proximity/2) ||w - w_0||^2, w_0 being the stage before it, where there is one."""

    model: nn.Module
    likelihood: object
    train: list
    queries: list
    decay: float = 0.0
    proximity: float = 0.0

    def objective(self, weights, start, removed):
        """removed: how much the weight 1/N of each example is increased, (examples,), as a share of it."""
        inputs, targets = (torch.stack(side) for side in zip(*self.train, strict=True))
        losses = self.likelihood.loss(functional_call(self.model, unflat(self.model, weights), (inputs,)), targets)
        penalty = self.decay * weights.square().sum() + (self.proximity * (weights - start).square().sum() if self.proximity else 0)
        return ((1 + removed) * losses).mean() + penalty / 2

    def minimum(self, start, removed, begin):
        """Newton's iterations to the minimum near `begin`."""
        weights = begin
        for _ in range(50):
            slope = grad(self.objective)(weights, start, removed)
            if float(slope.norm()) < 1e-13:
                break
            weights = weights - torch.linalg.solve(jacrev(grad(self.objective))(weights, start, removed), slope)
        assert float(slope.norm()) < 1e-10, "not at a minimum"
        return weights

    def measured(self, weights):
        inputs, targets = (torch.stack(side) for side in zip(*self.queries, strict=True))
        return self.likelihood.loss(functional_call(self.model, unflat(self.model, weights), (inputs,)), targets)

    def attributed(self, weights) -> Attributed:
        with torch.no_grad():
            for name, value in unflat(self.model, weights).items():
                self.model.get_parameter(name).copy_(value)
        return inspect(Given(self.model, self.likelihood, self.train, self.queries), self.model, self.train)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def unflat(model, weights):
    named = dict(model.named_parameters())
    pieces = weights.split([p.numel() for p in named.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}


def trained(stages, removed=None, begins=None):
    """The minima of the stages, the latest first as they are given. removed: by stage, where any is."""
    start, found = None, []
    for k in reversed(range(len(stages))):
        stage = stages[k]
        begin = (flat(stage.model) if start is None else start) if begins is None else begins[k]
        none = torch.zeros(len(stage.train), dtype=torch.float64)
        start = stage.minimum(start, none if removed is None or removed[k] is None else removed[k], begin)
        found.insert(0, start)
    return found


def derivatives(stages, k, step=1e-4):
    """d f_q / d eps_i for examples of stage k, by training all stages again with example i a little heavier and lighter: (query, train)."""
    minima, columns = trained(stages), []
    for i in range(len(stages[k].train)):
        sides = []
        for sign in (1, -1):
            heavier = torch.zeros(len(stages[k].train), dtype=torch.float64)
            heavier[i] = sign * step
            removed = [heavier if j == k else None for j in range(len(stages))]
            sides.append(stages[0].measured(trained(stages, removed, minima)[0]))
        columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns, 1).detach()


def influences(stages, method, *, carried=None, second=True, examples=None, calls=1):
    """Scores of every stage, the latest first, as `tda` computes them.

    Wrong on purpose: carried, in place of the proximity; second = False leaves the earlier stages' inverses out; examples: how many the
    curvature of the earlier stages is taken from.
    """
    subjects = [stage.attributed(weights) for stage, weights in zip(stages, trained(stages), strict=True)]

    def work(subject, inverse, count=None):
        train = subject.problem.train_data()[:count]
        curvature = [tuple(fit_factors(subject, train, fisher=fit.of, batch_size=64)) for fit in inverse.fits]
        return Work(subject, train, curvature, 0, 64)

    gradients, _ = query_gradients(subjects[0], stages[0].queries, range(QUERIES), batch_size=QUERIES)
    each = [(method, work(subjects[0], method), None)]
    each += [(s.inverse, work(subject, s.inverse, examples), s) for s, subject in zip(method.stages, subjects[1:], strict=True)]
    for _ in range(calls):
        found, asked, later = [], gradients, None
        for inverse, given, stage in each:
            if stage is not None:
                factor = -stage.proximity if carried is None else carried
                asked = carry(later[0].blocks, later[1], given.attributed.blocks, factor, torch.float64)
            plain = stage is not None and not second
            made = [Dense(-g.matrix) for g in asked] if plain else inverse.directions(given, asked).passes[0]
            later = (given.attributed, made)
            found.append(_scores(given.attributed, made))
    return found


def _scores(subject, directions):
    train = subject.problem.train_data()
    scorer = Scorer("multistage", directions, torch.ones(QUERIES))
    ids = range(len(train))
    return score(subject, [scorer], train, ids, examples=len(ids), batch_size=7, self_influence=False).influence[0]
