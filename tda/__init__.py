"""Training data attribution: which training examples made a model do what it does."""

from tda.errors import InputError
from tda.likelihoods import Bernoulli, Categorical, Gaussian, TokenCategorical
from tda.measurements import absolute_error, margin
from tda.problem import Batch, Problem

__version__ = "0.1.0"

__all__ = ["Batch", "Bernoulli", "Categorical", "Gaussian", "InputError", "Problem", "TokenCategorical", "__version__", "absolute_error", "margin"]
