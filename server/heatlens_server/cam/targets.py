"""From the classes wanted to the scalar to differentiate. Traced into exported graphs like the rest of this folder."""

import torch
from torch import Tensor

from heatlens_server.cam.catalog import ABSENT, RANKED
from heatlens_server.cam.precision import wide

__all__ = ["ABSENT", "RANKED", "resolve", "score"]


def resolve(logits: Tensor, wanted: Tensor) -> Tensor:
    """Turn the classes wanted into class ids.

    Equal logits rank by class id, lowest first, on every device and at every batch size; `Tensor.topk` leaves their
    order open.

    Args:
        logits: (N, C) floating point.
        wanted: int64 (N, K), K <= C. An entry is a class id in [0, C), `RANKED` or `ABSENT`. Ids are not checked
            here: that would make the graph depend on the data.

    Returns:
        int64 (N, K) class ids; `ABSENT` where `wanted` is.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: must be (N, C), not {tuple(logits.shape)}")
    if wanted.ndim != 2 or wanted.dtype != torch.int64 or wanted.shape[0] != logits.shape[0]:
        raise ValueError(f"wanted: must be int64 ({logits.shape[0]}, K), not {wanted.dtype} {tuple(wanted.shape)}")
    count = wanted.shape[1]
    if not 1 <= count <= logits.shape[1]:
        raise ValueError(f"wanted: must hold 1 to {logits.shape[1]} classes per image, not {count}")
    if count == 1:
        # The common case: argmax takes the first of equals by contract and costs a fraction of a sort.
        ranked = logits.argmax(dim=1, keepdim=True)
    else:
        # A gather, not a slice: sliced strides make a traced graph doubt that K may be any number.
        positions = torch.arange(count, device=logits.device).expand(logits.shape[0], count)
        ranked = torch.sort(logits, dim=1, descending=True, stable=True).indices.gather(1, positions)
    return torch.where(wanted == RANKED, ranked, wanted)


def score(logits: Tensor, class_ids: Tensor, k: int) -> Tensor:
    """Sum, over the batch, the logits of each image's k-th class: the scalar to differentiate.

    Images do not meet inside a network in eval mode, so the gradient of this sum at image n is the gradient of image
    n's own logit. Where the class is absent it is zero.

    Args:
        logits: (N, C) floating point.
        class_ids: int64 (N, K), as `resolve` returns them.
        k: which of the K, in [0, K).

    Returns:
        A scalar, float32 or wider.
    """
    ids = class_ids[:, k : k + 1]
    # Wide so that the sum over the batch cannot overflow float16; the gradient is 1 all the same.
    chosen = wide(logits.gather(1, ids.clamp(min=0)))
    return torch.where(ids >= 0, chosen, 0.0).sum()
