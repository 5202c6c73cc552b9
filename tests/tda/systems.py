"""A small system that solvers are tried on, with its dense solution, and the solvers by name."""

import torch
from torch import nn

from tda import Categorical, flat
from tda.directions import dense, query_gradients
from tda.modules import inspect
from tda.solvers.astra import NAMED, Schedule, astra
from tda.solvers.block import block_conjugate_gradients
from tda.solvers.cg import conjugate_gradients
from tda.solvers.operator import Operator
from tda.solvers.preconditioner import ekfac_preconditioner
from tda.solvers.sni import neumann
from tda.solvers.system import System
from tests.tda.pipeline import Given, fit

EXAMPLES, QUERIES, DAMPING = 40, 6, 1e-1


class Setting:
    """A small classifier, its damped GGN as a system, the dense solution, and EK-FAC."""

    def __init__(self, kind="ggn", damping=DAMPING, dtype=torch.float64):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype).eval()
        data, queries = ([(torch.randn(5).to(dtype), torch.randint(0, 3, ())) for _ in range(n)] for n in (EXAMPLES, QUERIES))
        self.attributed = inspect(Given(model, Categorical(), data, queries), model, data)
        self.blocks = self.attributed.blocks
        gradients, _ = query_gradients(self.attributed, queries, range(QUERIES), batch_size=4)
        self.right = flat.flatten(self.blocks, [dense(g) for g in gradients])
        self.operator = Operator(self.attributed, data, kind, batch_size=EXAMPLES)
        self.matrix = self.operator.rows(0, self.operator.size).double()
        self.system = self.damped(damping)
        self.factors = fit(self.attributed, data, [range(EXAMPLES)], fisher="exact")
        self.ekfac = ekfac_preconditioner(self.blocks, self.factors, damping)
        self.exact = torch.linalg.solve(self.matrix + damping * torch.eye(len(self.matrix)), self.right.double().T).T

    def damped(self, damping):
        return System(self.operator.product, torch.tensor(damping, dtype=torch.float64), self.right, EXAMPLES)

    def error(self, x):
        return float(((x.double() - self.exact).norm(dim=1) / self.exact.norm(dim=1)).max())


SOLVERS = {
    "cg": lambda s, **more: conjugate_gradients(s.system, **{"tolerance": 1e-9, "max_steps": 300, **more}),
    "preconditioned cg": lambda s, **more: conjugate_gradients(
        s.system, precondition=s.ekfac, **{"tolerance": 1e-9, "max_steps": 300, **more}
    ),
    "block cg": lambda s, **more: block_conjugate_gradients(s.system, s.ekfac, **{"tolerance": 1e-9, "max_steps": 100, **more}),
    "sni": lambda s, **more: neumann(s.system, **{"tolerance": 1e-8, "max_steps": 3000, **more}),
    "astra": lambda s, **more: astra(s.system, s.ekfac, schedule=Schedule(2000), **{"tolerance": 1e-9, **more}),
    "astra with momentum": lambda s, **more: astra(s.system, s.ekfac, schedule=Schedule(2000, momentum=0.5), **{"tolerance": 1e-9, **more}),
    "astra tuned": lambda s, **more: astra(s.system, s.ekfac, schedule=NAMED["tuned"], **{"tolerance": 1e-9, **more}),
}
#: The same with mini-batches, and few steps.
SHORT = {
    "sni on mini-batches": lambda s, **more: neumann(s.system, batch_size=7, max_steps=9, repeats=2, tolerance=1e-9, **more),
    "astra paper": lambda s, **more: astra(
        s.system, s.ekfac, schedule=Schedule(12, 8, of_damping=0.1, momentum=0.9, decay=0.5, decay_every=5), tolerance=1e-9, **more
    ),
}
