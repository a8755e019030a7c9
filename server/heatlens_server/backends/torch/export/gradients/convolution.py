"""The input gradient of convolutions, itself a convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def convolution_backward(  # noqa: PLR0917 - the operator's signature
    grad: Tensor,
    source: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,  # noqa: ARG001 - the operator's signature
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],  # noqa: ARG001 - the input's size says the same
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, None, None]:
    """Differentiate a convolution with respect to its input; its weight and bias must be constants.

    The adjoint of a convolution is the transposed convolution with the same weight, stride, padding and dilation,
    and the other way round (Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, ch. 4).
    Several input sizes give one output size when the stride does not divide; `output_padding`, always less than the
    stride, is what is missing of the right one.

    Args:
        grad: (N, D, o_1, ..., o_n), the gradient with respect to the output; n = 1, 2 or 3.
        source: (N, C, i_1, ..., i_n), the input; only its spatial sizes are used.
        weight: (D, C / groups, k_1, ..., k_n), or (C, D / groups, k_1, ..., k_n) if transposed.
        bias_sizes: not used.
        stride: per spatial dimension, or one for all; so are padding and dilation.
        padding: zeros on each side of the input.
        dilation: distance of the kernel's elements.
        transposed: whether the forward operator is the transposed convolution.
        output_padding: not used.
        groups: the number of independent groups of channels.
        output_mask: which gradients are asked for: input, weight, bias.

    Returns:
        (input gradient or None, None, None).

    Raises:
        NotImplementedError: the gradient with respect to the weight or the bias is asked for, that is, the weights
            are computed from the activations.
    """
    if output_mask[1] or output_mask[2]:
        raise NotImplementedError("convolution: its weights depend on the explained activations, which has no gradient")
    if not output_mask[0]:
        return None, None, None
    rank = weight.ndim - 2
    stride, padding, dilation = (_per_dimension(values, rank) for values in (stride, padding, dilation))
    if transposed:
        return aten.convolution(grad, weight, None, stride, padding, dilation, False, [0] * rank, groups), None, None
    missing = [
        source.shape[2 + i]
        - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
        for i in range(rank)
    ]
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, missing, groups), None, None


def _per_dimension(values: Sequence[int], rank: int) -> list[int]:
    return list(values) * rank if len(values) == 1 else list(values)
