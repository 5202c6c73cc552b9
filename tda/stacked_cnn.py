"""Gradients of many small convolutional networks at once, written out by hand: vmap makes grouped convolutions of them, which are slow.

A convolution is a product with its windows (im2col), batched over models. Examples come last in memory, so that windows are copied, and
added back, by whole rows of examples, products are long, and weights are used as they lie. Sums run in another order than in a
convolution of one model, so that the numbers are those of training alone up to rounding, not to the bit.

Shape suffixes: M models, B examples of a batch, C channels, H and W height and width, P positions (H W B), K numbers of a window, I inputs
and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tda.likelihoods import Likelihood
from tda.problem import Batch, Problem
from tda.stacked_mlp import output_gradient

#: Numbers in the windows of the models that are worked on together: about what the caches of a core hold.
CACHED = 1 << 20

#: (gradient of the output, whether that of the input is asked for) -> gradient of the input, then those of the layer's parameters.
Backward = Callable[[Tensor, bool], tuple[Tensor | None, list[Tensor]]]
#: (name, shape, one of that dtype and device) -> memory that holds anything.
Take = Callable[[str, Sequence[int], Tensor], Tensor]


def cnn_gradients(problem: Problem, model: nn.Module, batch: Batch) -> Callable[[list[Tensor], Tensor, Tensor], list[Tensor]] | None:
    """The function (parameters, inputs, targets) -> gradients of each model's mean loss; None where the model is not of this kind.

    The kind: on inputs (B, C, H, W), a Sequential of Conv2d (zero padding, one group; the first layer is one), ReLU (not twice in a row),
    MaxPool2d and AvgPool2d (without padding), one Flatten, then Linear and ReLU, the last a Linear; all trained, with the problem's
    default `predict` and one output row per example. Parameters in the model's order, (M, ...) each.
    """
    plain = type(model) is nn.Sequential and type(problem).predict is Problem.predict
    if not (plain and isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 4):
        return None
    assert isinstance(model, nn.Sequential)
    layers = list(model)  # its children() leave out what stands in two places
    if not _known(layers):
        return None
    # One layer twice would be one parameter with two gradients.
    held, own = [parameter for layer in layers for parameter in layer.parameters()], list(model.parameters())
    if len(held) != len(own) or not all(parameter.requires_grad for parameter in own):
        return None
    likelihood, numbers, room = problem.likelihood, _window_numbers(layers, batch.inputs), _Room()

    def gradients(parameters: list[Tensor], inputs: Tensor, targets: Tensor) -> list[Tensor]:
        step = max(1, CACHED // (numbers * inputs.shape[1]))
        return _gradients(likelihood, layers, step, room, parameters, inputs, targets)

    return gradients


def _known(layers: Sequence[Any]) -> bool:
    """Whether all layers, and their order, are written out here."""
    kinds = [type(layer) for layer in layers]
    if kinds.count(nn.Flatten) != 1 or (kinds[0], kinds[-1]) != (nn.Conv2d, nn.Linear):
        return False
    flat = kinds.index(nn.Flatten)
    if (layers[flat].start_dim, layers[flat].end_dim) != (1, -1):
        return False
    twice = (nn.ReLU, nn.ReLU) in pairwise(kind for kind in kinds if kind is not nn.Flatten)
    return not twice and all(map(_spatial, layers[:flat])) and all(kind in (nn.Linear, nn.ReLU) for kind in kinds[flat + 1 :])


def _spatial(layer: Any) -> bool:
    """Whether it is one of the layers before the Flatten, with options that are written out here."""
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if type(layer) is nn.MaxPool2d:
        return _pair(layer.padding) == (0, 0) and _pair(layer.dilation) == (1, 1) and not layer.ceil_mode and not layer.return_indices
    if type(layer) is nn.AvgPool2d:
        return _pair(layer.padding) == (0, 0) and not layer.ceil_mode and layer.divisor_override is None
    return type(layer) is nn.ReLU


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _window_numbers(layers: Sequence[Any], inputs: Tensor) -> int:
    """Numbers in the largest windows of one example."""
    most, example = 1, inputs[:1]
    with torch.no_grad():
        for layer in layers:
            kernel = prod(_pair(layer.kernel_size)) if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) else 1
            into, example = example.shape[1], layer(example)
            most = max(most, into * kernel * prod(example.shape[2:]))
    return most


class _Room:
    """Memory that is taken again at every step: fresh pages cost as much time as the numbers that are written to them."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, str], Tensor] = {}

    def of(self, place: int) -> Take:
        """What the layer at a place takes its memory with; what it held under that name is then overwritten."""

        def take(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
            count, key = prod(shape), (place, name)
            if key not in self.held or self.held[key].numel() < count:
                self.held[key] = like.new_empty(count)
            return self.held[key][:count].view(*shape)

        return take


def _gradients(
    likelihood: Likelihood, layers: Sequence[Any], step: int, room: _Room, parameters: list[Tensor], inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    """`step` models at a time: what they keep for the way back stays in the cache."""
    found = [torch.empty_like(parameter) for parameter in parameters]
    for start in range(0, len(inputs), step):
        some = slice(start, start + step)
        part = _of_some(likelihood, layers, room, [parameter[some] for parameter in parameters], inputs[some], targets[some])
        for into, gradient in zip(found, part, strict=True):
            into[some] = gradient.view_as(into[some])
    return found


def _of_some(
    likelihood: Likelihood, layers: Sequence[Any], room: _Room, parameters: list[Tensor], inputs: Tensor, targets: Tensor
) -> list[Tensor]:
    given, back, value = iter(parameters), list[Backward](), inputs.permute(0, 2, 3, 4, 1)
    for place, layer in enumerate(layers):
        value, backward = _FORWARD[type(layer)](layer, value, given, room.of(place))
        back.append(backward)
    gradient: Tensor | None = output_gradient(likelihood, value.transpose(1, 2).contiguous(), targets).transpose(1, 2).contiguous()
    found = list[Tensor]()
    for place in range(len(layers) - 1, -1, -1):
        assert gradient is not None, "only that of the inputs is not asked for"
        gradient, own = back[place](gradient, place > 0)
        found = own + found
    return found


def _linear(layer: Any, value_MIB: Tensor, given: Iterator[Tensor], _: Take) -> tuple[Tensor, Backward]:
    weight_MOI = next(given)
    found = torch.bmm(weight_MOI, value_MIB)
    if layer.bias is not None:
        found += next(given)[:, :, None]

    def backward(gradient_MOB: Tensor, further: bool) -> tuple[Tensor | None, list[Tensor]]:  # noqa: ARG001  (there is a layer before it)
        own = [torch.bmm(gradient_MOB, value_MIB.transpose(1, 2)), *([gradient_MOB.sum(2)] if layer.bias is not None else [])]
        return torch.bmm(weight_MOI.transpose(1, 2), gradient_MOB), own

    return found, backward


def _conv(layer: Any, value_MCHWB: Tensor, given: Iterator[Tensor], take: Take) -> tuple[Tensor, Backward]:
    (models, channels, height, width, examples), (up, left) = value_MCHWB.shape, _pair(layer.padding)
    options = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.dilation)
    inside = (..., slice(up, up + height), slice(left, left + width), slice(None))
    padded = take("padded", (models, channels, height + 2 * up, width + 2 * left, examples), value_MCHWB).zero_()
    padded[inside] = value_MCHWB
    seen = _windows(padded, *options)
    windows = take("windows", seen.shape, seen).copy_(seen)
    windows_MKP, weight_MOK = windows.view(models, -1, prod(seen.shape[4:])), next(given).flatten(2)
    found = torch.bmm(weight_MOK, windows_MKP, out=take("found", (models, layer.out_channels, windows_MKP.shape[2]), seen))
    if layer.bias is not None:
        found += next(given)[:, :, None]

    def backward(gradient_MOHWB: Tensor, further: bool) -> tuple[Tensor | None, list[Tensor]]:
        gradient_MOP = gradient_MOHWB.flatten(2)
        own = [torch.bmm(gradient_MOP, windows_MKP.transpose(1, 2)), *([gradient_MOP.sum(2)] if layer.bias is not None else [])]
        if not further:
            return None, own
        spread = torch.bmm(weight_MOK.transpose(1, 2), gradient_MOP, out=windows_MKP)  # which are not looked at again
        return _add_back(spread.view(seen.shape), padded.zero_(), *options)[inside], own

    return found.view(models, -1, *seen.shape[4:]), backward


def _max_pool(layer: Any, value_MCHWB: Tensor, _: Iterator[Tensor], take: Take) -> tuple[Tensor, Backward]:
    options = (_pair(layer.kernel_size), _pair(layer.stride), (1, 1))
    seen = _windows(value_MCHWB, *options)
    spread = take("windows", seen.shape, seen).copy_(seen).flatten(2, 3)
    found, place = spread.max(2)  # of equal values the first, as torch's pooling has it

    def backward(gradient: Tensor, further: bool) -> tuple[Tensor | None, list[Tensor]]:  # noqa: ARG001  (there is a layer before it)
        spread.zero_().scatter_(2, place[:, :, None], gradient[:, :, None])
        return _add_back(spread.view(seen.shape), take("whole", value_MCHWB.shape, seen).zero_(), *options), []

    return found, backward


def _avg_pool(layer: Any, value_MCHWB: Tensor, _: Iterator[Tensor], take: Take) -> tuple[Tensor, Backward]:
    options = (_pair(layer.kernel_size), _pair(layer.stride), (1, 1))
    seen = _windows(value_MCHWB, *options)

    def backward(gradient: Tensor, further: bool) -> tuple[Tensor | None, list[Tensor]]:  # noqa: ARG001  (there is a layer before it)
        spread = (gradient / prod(options[0]))[:, :, None, None].expand(seen.shape)
        return _add_back(spread, take("whole", value_MCHWB.shape, seen).zero_(), *options), []

    return seen.mean((2, 3)).contiguous(), backward


def _relu(_: Any, value: Tensor, __: Iterator[Tensor], ___: Take) -> tuple[Tensor, Backward]:
    # In place: no layer looks again at what it gave, and the first is a convolution. On the way back all that came after is done with it.
    found = value.relu_()
    return found, lambda gradient, _: (torch.ops.aten.threshold_backward.grad_input(gradient, found, 0, grad_input=found), [])


def _flatten(_: Any, value_MCHWB: Tensor, __: Iterator[Tensor], ___: Take) -> tuple[Tensor, Backward]:
    return value_MCHWB.flatten(1, 3), lambda gradient, _: (gradient.reshape(value_MCHWB.shape), [])


_FORWARD: dict[type[nn.Module], Callable[[Any, Tensor, Iterator[Tensor], Take], tuple[Tensor, Backward]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.ReLU: _relu,
    nn.Flatten: _flatten,
}


def _windows(value_MCHWB: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """What the kernel sees at each position, a view (M, C, *kernel, H', W', B) of a contiguous tensor."""
    models, channels, *sides, examples = value_MCHWB.shape
    places = [(sides[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    over = value_MCHWB.stride()
    steps = [over[2 + i] * dilation[i] for i in (0, 1)] + [over[2 + i] * stride[i] for i in (0, 1)]
    return value_MCHWB.as_strided((models, channels, *kernel, *places, examples), (over[0], over[1], *steps, 1))


def _add_back(spread: Tensor, into_MCHWB: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """The transpose of `_windows`: every number of a window added to where it came from."""
    seen = _windows(into_MCHWB, kernel, stride, dilation)
    for places, rows in zip(seen.unbind(2), spread.unbind(2), strict=True):
        for place, values in zip(places.unbind(2), rows.unbind(2), strict=True):
            place.add_(values)
    return into_MCHWB
