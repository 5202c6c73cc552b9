"""One step of Langevin dynamics for many chains at once, in place and without a look at any number.

    sgld:     w <- w - (eps/2) [n_beta g + gamma (w - w*)] + sqrt(eps) xi
    rmsprop:  V <- 0.99 V + 0.01 g^2 ;  P = 1 / (sqrt(V) + 0.1)
              w <- w - (eps/2) P [n_beta g + gamma (w - w*)] + sqrt(eps P) xi

g is the gradient of the batch's mean loss. V starts at 0, is not corrected for that, and takes the new gradient before P is formed; P
multiplies likelihood and prior alike, as in 2509.26544, and the term for its dependence on w is left out as it is there: rmsprop
draws from the posterior only as far as V has settled. Shape suffixes: C chains, D numbers of a model that move.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tda.sampling.options import Sampling

DECAY, FLOOR = 0.99, 0.1

#: Standard normal noise (C, D), scaled as `noise_scale` says -> nothing: the weights have moved.
Update = Callable[[Tensor], None]


def noise_scale(sampling: Sampling) -> float:
    """The standard deviation with which an update wants its noise drawn."""
    return math.sqrt(sampling.step_size)


def sgld(sampling: Sampling, center_D: Tensor, weights_CD: Tensor, gradient_CD: Tensor) -> Update:
    """The update of plain SGLD: three kernels."""
    pull, push = sampling.step_size * sampling.localization / 2, -sampling.step_size * sampling.n_beta / 2
    home_D = pull * center_D

    def update(noise_CD: Tensor) -> None:
        torch.add(noise_CD, weights_CD, alpha=1 - pull, out=weights_CD).add_(gradient_CD, alpha=push)
        if pull:
            weights_CD.add_(home_D)

    return update


def rmsprop(sampling: Sampling, center_D: Tensor, weights_CD: Tensor, gradient_CD: Tensor, square_CD: Tensor) -> Update:
    """The update of RMSprop-SGLD; V is `square_CD`, updated in place."""
    drift_CD, scale_CD = torch.empty_like(weights_CD), torch.empty_like(weights_CD)

    def update(noise_CD: Tensor) -> None:
        square_CD.mul_(DECAY).addcmul_(gradient_CD, gradient_CD, value=1 - DECAY)
        torch.sqrt(square_CD, out=scale_CD).add_(FLOOR).reciprocal_()
        torch.sub(weights_CD, center_D, out=drift_CD).mul_(sampling.localization).add_(gradient_CD, alpha=sampling.n_beta)
        weights_CD.addcmul_(scale_CD, drift_CD, value=-sampling.step_size / 2)
        weights_CD.addcmul_(scale_CD.sqrt_(), noise_CD)

    return update
