"""What single tokens add to the scores of a run's gradient methods, computed for its report from its directions and factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tasks.directions import curvature_of, read_directions
from tasks.plan import Plan
from tasks.report_tokens import Parting, Parts
from tasks.scores import Scored
from tasks.subject import open_subject
from tda.device import placed
from tda.errors import InputError
from tda.likelihoods import TokenCategorical
from tda.methods.work import Work
from tda.stored_tokens import FACTORED, joint_scores
from tda.token_scores import token_scores

#: Directions are made of so many numbers at most for one query, parted by its own tokens: parameters x tokens. Seconds.
QUERY_SIDE = 2_000_000_000


def parting(plan: Plan) -> Parting | None:
    """The parts of a run whose scores are done; None where its examples are no token sequences, or its scores means over several models."""
    opened = open_subject(plan.first.subject)
    if not isinstance(opened.attributed.problem.likelihood, TokenCategorical) or len(plan.members) > 1:
        return None
    size = sum(block.size for block in opened.attributed.blocks)

    def parted(place: int, query: int, train: Sequence[int]) -> Parts | None:
        """As `Parting` says."""
        scored, examples = plan.first.scores.methods[place], plan.inputs.examples
        method = scored.directions.parsed()
        if method.meets != "final" or method.cosine or method.unit == "correlation" or not method.takes_gradients:
            return None
        shortened = method.rank is not None or getattr(method, "separable", 0.0) > 0
        try:
            both = None
            if method.name in FACTORED and size * len(opened.query[query][1]) <= QUERY_SIDE:
                both = joint_scores(_work(scored), method, query, train, examples=examples).float().cpu().numpy()
            if both is not None and not shortened:
                return Parts(both.sum(2), both.sum(1))
            # The directions that the scores are of, whatever the run approximated in them: the parts add up to what is stored.
            read = read_directions(scored.directions, range(query, query + 1)).passes[0]
            directions = placed(read, opened.attributed.device)
            with torch.enable_grad():
                found = token_scores(opened.attributed, directions, opened.train, train, examples=examples)[0].float().cpu().numpy()
        except InputError:  # a layer that has no part for each token: `run.token_influence` says which
            return None
        return Parts(found, None if both is None else both.sum(1), in_full=both is not None)

    return parted


def _work(scored: Scored) -> Work:
    job = scored.directions
    return Work(open_subject(job.subject).attributed, None, curvature_of(job), job.seed, job.batch_size)
