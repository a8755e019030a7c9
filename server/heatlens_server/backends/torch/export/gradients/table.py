"""What the tracer replaces: gradients without a form of their own, and forward operators whose gradient is hostile."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from heatlens_server.backends.torch.export.gradients.attention import scaled_dot_product_attention
from heatlens_server.backends.torch.export.gradients.convolution import convolution_backward
from heatlens_server.backends.torch.export.gradients.pooling import (
    adaptive_avg_pool,
    adaptive_avg_pool_backward,
    adaptive_max_pool,
    avg_pool_backward,
    max_pool_with_indices_backward,
    scatter_to_chosen,
)
from heatlens_server.backends.torch.export.gradients.products import linear, matmul, reshape
from heatlens_server.backends.torch.export.gradients.separable import (
    reflection_pad_backward,
    replication_pad_backward,
    unfold_backward,
)
from heatlens_server.backends.torch.export.gradients.slicing import copy, select_backward, slice_backward
from heatlens_server.backends.torch.export.gradients.upsampling import interpolation, interpolation_vec

# ruff: noqa: SLF001 - operators with an underscore are operators all the same

aten = torch.ops.aten

_OURS: dict[OpOverload, Callable[..., Any]] = {
    aten.convolution_backward.default: convolution_backward,
    aten.avg_pool2d_backward.default: avg_pool_backward,
    aten.avg_pool3d_backward.default: avg_pool_backward,
    aten._adaptive_avg_pool2d_backward.default: partial(adaptive_avg_pool_backward, rank=2),
    aten._adaptive_avg_pool3d_backward.default: partial(adaptive_avg_pool_backward, rank=3),
    aten.max_pool2d_with_indices_backward.default: max_pool_with_indices_backward,
    aten.max_pool3d_with_indices_backward.default: max_pool_with_indices_backward,
    aten.adaptive_max_pool2d_backward.default: partial(scatter_to_chosen, rank=2),
    aten.adaptive_max_pool3d_backward.default: partial(scatter_to_chosen, rank=3),
    aten.replication_pad1d_backward.default: replication_pad_backward,
    aten.replication_pad2d_backward.default: replication_pad_backward,
    aten.replication_pad3d_backward.default: replication_pad_backward,
    aten.reflection_pad1d_backward.default: reflection_pad_backward,
    aten.reflection_pad2d_backward.default: reflection_pad_backward,
    aten.reflection_pad3d_backward.default: reflection_pad_backward,
    aten.select_backward.default: select_backward,
    aten.slice_backward.default: slice_backward,
    aten.unfold_backward.default: unfold_backward,
}

_TORCHS = {
    operator: rule
    for operator, rule in decomposition_table.items()
    if isinstance(operator, OpOverload) and "backward" in str(operator) and str(operator).endswith(".default")
}

TABLE: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType({**_TORCHS, **_OURS})
"""Gradients that make_fx replaces while it traces: PyTorch's own rules, and ours where it has none or a worse one."""

_INTERPOLATIONS: dict[Any, bool] = {
    aten.upsample_linear1d: True,
    aten.upsample_bilinear2d: True,
    aten.upsample_trilinear3d: True,
    aten.upsample_bicubic2d: True,
    aten._upsample_bilinear2d_aa: True,
    aten._upsample_bicubic2d_aa: True,
    aten.upsample_nearest1d: False,
    aten.upsample_nearest2d: False,
    aten.upsample_nearest3d: False,
    aten._upsample_nearest_exact1d: False,
    aten._upsample_nearest_exact2d: False,
    aten._upsample_nearest_exact3d: False,
}
"""Operators, and whether they have the argument align_corners."""

SUBSTITUTES: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType(
    {
        # A recorded view presumes the strides of the trace.
        aten.view.default: reshape,
        aten._unsafe_view.default: reshape,
        aten.adaptive_avg_pool2d.default: partial(adaptive_avg_pool, rank=2),
        aten.adaptive_avg_pool3d.default: partial(adaptive_avg_pool, rank=3),
        aten.adaptive_max_pool2d.default: adaptive_max_pool,
        **{op.default: interpolation(op.default, aligned=aligned) for op, aligned in _INTERPOLATIONS.items()},
        **{op.vec: interpolation_vec(op.default, aligned=aligned) for op, aligned in _INTERPOLATIONS.items()},
        aten.copy.default: copy,
        aten.linear.default: linear,
        aten.matmul.default: matmul,
        aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    }
)
"""Forward operators to replace before autograd records them, with functions of the same arguments."""
