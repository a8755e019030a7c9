"""Embedding models: the goal is the similarity to a reference."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from heatlens_server.backends.torch.goals.base import Goals, RunImages, TaskModel, sum_of
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Score
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import Similarity, Target
from heatlens_server.maps.precision import at_least_float32

_SAME = 16 * torch.finfo(torch.float32).eps
"""How far apart two directions may be that are the same, in a network of float32."""

_HALF_ROUNDINGS = 2
"""The same for half precision, in units of its rounding."""


class SimilarityGoals(Goals):
    """The cosine similarity of each of N images to its reference."""

    width = 1

    def __init__(self, embeddings: Tensor, references: Tensor, *, score: Score) -> None:
        """Take what is compared.

        Args:
            embeddings: (N, D).
            references: (N, D), not attached to a graph.
            score: the similarity s, or as a probability (1 + s) / 2.
        """
        self._embeddings = embeddings
        self._references = references
        self._kind = score

    @property
    def class_ids(self) -> Tensor:
        """int64 (N, 1), all 0: there are no classes."""
        return torch.zeros(len(self._embeddings), 1, dtype=torch.int64, device=self._embeddings.device)

    def score(self, k: int) -> Tensor:  # noqa: ARG002 - there is one
        """The sum of every image's score."""
        return self._scored(_similarity(self._embeddings, self._references)).sum()

    def scores_of(self, n: int, output: Tensor) -> Tensor:
        """Scores (R, 1) of embeddings (R, D) with image n's reference."""
        return self._scored(_similarity(output, self._references[n : n + 1]))[:, None]

    def probabilities(self, n: int, output: Tensor) -> Tensor:
        """(1 + s) / 2, (R, 1), of embeddings (R, D) with image n's reference."""
        return (1.0 + _similarity(output, self._references[n : n + 1]))[:, None] / 2.0

    def by_name(self, n: int) -> Similarity:
        """The reference's embedding."""
        return Similarity(self._references[n].float().cpu().numpy())

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's embedding, similarity and map."""
        with torch.no_grad():
            similarity = _similarity(self._embeddings[n : n + 1], self._references[n : n + 1])
            # Rounding may leave [-1, 1].
            logit = float(similarity.clamp(-1.0, 1.0))
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=(0,),
            maps=maps,
            scales=scales,
            offsets=offsets,
            findings=(Finding(0, logit, (1.0 + logit) / 2.0),),
            embedding=self._embeddings[n].detach().float().cpu().numpy(),
        )

    def _scored(self, similarity: Tensor) -> Tensor:
        return (1.0 + similarity) / 2.0 if self._kind is Score.PROBABILITY else similarity


def _similarity(embeddings: Tensor, references: Tensor) -> Tensor:
    """Cosine similarities (R,) of embeddings (R, D) and references (R, D) or (1, D), float32 or wider.

    Where the two have the same direction but for rounding, nothing raises the similarity: the gradient is zero instead
    of what rounding makes of it.
    """
    rounding = max(_SAME, _HALF_ROUNDINGS * torch.finfo(embeddings.dtype).eps)
    one, other = F.normalize(at_least_float32(embeddings), dim=1), F.normalize(at_least_float32(references), dim=1)
    similarity = (one * other).sum(dim=1)
    with torch.no_grad():
        same = (one - other).norm(dim=1) <= rounding
    return torch.where(same, similarity.detach(), similarity)


def _of_ordinary_scale(reference: npt.ArrayLike) -> Float32Array:
    """A vector times the power of two that brings its largest magnitude to [0.5, 1).

    The norm of very small or large elements is zero or infinite in float32. A power of two changes no digit.
    """
    vector = np.asarray(reference, np.float64)
    _, exponent = np.frexp(np.abs(vector).max())
    scaled: Float32Array = np.ldexp(vector, -exponent).astype(np.float32)
    return scaled


class Embedding(TaskModel):
    """Runs networks that return (N, D)."""

    def __init__(self, reading: OutputReading) -> None:
        """Say how what the network returns becomes embeddings."""
        self._reading = reading

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Embeddings (R, D) of inputs (R, C, H, W)."""
        return self._reading(module, inputs)

    def goals(self, output: Tensor, targets: Sequence[Target], *, score: Score, run: RunImages) -> SimilarityGoals:
        """Take the references, or run the network on those that are images.

        Raises:
            TypeError: a target is of another task.
        """
        chosen = [target.reference for target in targets if isinstance(target, Similarity)]
        if len(chosen) < len(targets):
            raise TypeError("an embedding model explains similarities")
        images = [n for n, reference in enumerate(chosen) if reference.ndim == 3]
        references = torch.zeros_like(output, dtype=at_least_float32(output.detach()).dtype, requires_grad=False)
        for n, reference in enumerate(chosen):
            if n not in images:
                references[n] = torch.from_numpy(_of_ordinary_scale(reference)).to(references.device)
        if images:
            references[images] = at_least_float32(run(np.stack([chosen[n] for n in images])))
        return SimilarityGoals(output, references, score=score)

    def total(self, output: Tensor, class_count: int) -> Tensor:
        """The sum of the elements."""
        return sum_of(output, class_count)
