"""What is explained about the images of a batch: for each goal, the gradient that a backward pass starts with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.box_goals import BoxGoals
from heatlens_server.backends.onnx.graph_rows import class_index
from heatlens_server.backends.onnx.network import NetworkInfo
from heatlens_server.backends.onnx.pixel_goals import PixelGoals
from heatlens_server.core.arrays import Float32Array, ImageArray
from heatlens_server.core.methods import Score
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import ClassIds, Direction, Similarity, Target, Values, class_targets
from heatlens_server.core.tasks import Activation, Task
from heatlens_server.maps.steps import job
from heatlens_server.maps.targets import class_scores, probabilities, resolve, seeds

Array = npt.NDArray[Any]
Scores = Mapping[str, Array]
"""What a network returned, by name: (N, ...)."""


RunImages = Callable[[ImageArray], Scores]
"""Runs the network on further images (R, H, W, C)."""

_SAME = 16 * float(np.finfo(np.float32).eps)
"""How far apart two directions may be that are the same."""


class Goals(job.Goals, Protocol):
    """What is explained about N images, up to `width` goals of each."""

    def seed(self, k: int) -> Scores:
        """By name, the derivative of every image's k-th score by what the network returned, of the same shape."""
        ...

    def scores_of(self, n: int, outputs: Scores) -> Float32Array:
        """The scores (R, K) of image n's goals in what the network returned for R changed versions of that image."""
        ...

    def probabilities(self, n: int, outputs: Scores) -> Float32Array:
        """The same as probabilities, in [0, 1]."""
        ...


class ClassGoals:
    """Classes of N images. Implements `Goals`."""

    def __init__(self, outputs: Scores, targets: Sequence[Target], *, task: Task, score: Score) -> None:
        """Rank the classes.

        Args:
            outputs: one, of (N, C) or (N, C, 1, 1). For `Task.BINARY` that is (N, 1), whose two classes have -z and z,
                or (N, 2), which are these.
            targets: N targets.
            task: one that has image classes.
            score: what is explained about a class.
        """
        ((self._name, output),) = outputs.items()
        self._shape = output.shape
        self._is_binary = task is Task.BINARY and output.shape[1] == 1
        self._logits = self._logits_of(outputs)
        chosen = class_targets(targets)
        self._counts = [target.count for target in chosen]
        self._ids: npt.NDArray[np.int64] = resolve(self._logits, class_index(chosen))
        self._kind = score
        self._sigmoid = task.traits.activation is Activation.SIGMOID
        self._seeds: Array = seeds(self._logits, self._ids, score, sigmoid=self._sigmoid)
        self._dtype = output.dtype

    @property
    def width(self) -> int:
        """The most classes that are explained of an image."""
        return max(self._counts)

    @property
    def class_ids(self) -> npt.NDArray[np.int64]:
        """(N, width); ABSENT where an image has fewer."""
        return self._ids

    def seed(self, k: int) -> Scores:
        """The derivative of every image's k-th class's score by the network's output."""
        seed = self._seeds[:, k]
        if self._is_binary:
            seed = seed[:, 1:] - seed[:, :1]
        return {self._name: seed.reshape(self._shape).astype(self._dtype, copy=False)}

    def scores_of(self, n: int, outputs: Scores) -> Float32Array:
        """Scores (R, K) of image n's classes in logits of R rows."""
        logits = self._logits_of(outputs)
        ids = np.broadcast_to(self._ids_of(n), (len(logits), self._counts[n]))
        found: Float32Array = class_scores(logits, ids, self._kind, sigmoid=self._sigmoid)
        return found

    def probabilities(self, n: int, outputs: Scores) -> Float32Array:
        """Probabilities (R, K) of image n's classes in logits of R rows."""
        found: Float32Array = probabilities(self._logits_of(outputs), sigmoid=self._sigmoid)[:, self._ids_of(n)]
        return found

    def by_name(self, n: int) -> ClassIds:
        """Image n's classes by id."""
        return ClassIds(tuple(self._ids_of(n).tolist()))

    def least_probable(self, n: int) -> ClassIds:
        """The least probable class."""
        return ClassIds((int(self._logits[n].argmin()),))

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's result."""
        count = self._counts[n]
        return ImageResult(
            logits=self._logits[n],
            class_ids=tuple(self._ids_of(n).tolist()),
            maps=maps[:count],
            scales=scales[:count],
            offsets=offsets[:count],
        )

    def _ids_of(self, n: int) -> npt.NDArray[np.int64]:
        return self._ids[n, : self._counts[n]]

    def _logits_of(self, outputs: Scores) -> Float32Array:
        """Logits (R, C) of what the network returned for R images."""
        flat = _rows(outputs[self._name])
        return np.concatenate([-flat, flat], axis=1) if self._is_binary else flat


class ValueGoals:
    """Values of N images, of which an increase or a decrease is explained. Implements `Goals`."""

    def __init__(self, outputs: Scores, targets: Sequence[Target]) -> None:
        """Take the values.

        Args:
            outputs: one, of (N, C) or (N, C, 1, 1).
            targets: N `Values`.

        Raises:
            TypeError: a target is of another task.
        """
        ((self._name, self._output),) = outputs.items()
        self._values = _rows(self._output)
        self._targets = [target for target in targets if isinstance(target, Values)]
        if len(self._targets) < len(targets):
            raise TypeError("a model for regression explains values")

    @property
    def width(self) -> int:
        """The most values that are explained of an image."""
        return max(target.count for target in self._targets)

    def seed(self, k: int) -> Scores:
        """One, or its negative where a decrease is explained, at every image's k-th value."""
        seed = np.zeros_like(self._output)
        flat = seed.reshape(len(seed), -1)
        for row, target in zip(flat, self._targets, strict=True):
            if k < target.count:
                row[target.ids[k]] = -1.0 if target.direction is Direction.DECREASE else 1.0
        return {self._name: seed}

    def scores_of(self, n: int, outputs: Scores) -> Float32Array:
        """Image n's values (R, K), or their negatives, in outputs of R rows."""
        target = self._targets[n]
        values = _rows(outputs[self._name])[:, list(target.ids)]
        return -values if target.direction is Direction.DECREASE else values

    def probabilities(self, n: int, outputs: Scores) -> Float32Array:
        """The same as `scores_of`: values have no probabilities, and those measures that need none ask for this."""
        return self.scores_of(n, outputs)

    def by_name(self, n: int) -> Values:
        """Image n's target, which names its values."""
        return self._targets[n]

    def least_probable(self, n: int) -> None:
        """Values have no such thing."""

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's values and maps."""
        target, values = self._targets[n], self._values[n]
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=target.ids,
            maps=maps[: target.count],
            scales=scales[: target.count],
            offsets=offsets[: target.count],
            findings=tuple(Finding(output, 0.0, 0.0, value=float(values[output])) for output in target.ids),
            values=values,
        )


class SimilarityGoals:
    """The cosine similarity of each of N images to its reference. Implements `Goals`."""

    width = 1

    def __init__(self, outputs: Scores, targets: Sequence[Target], *, score: Score, run: RunImages) -> None:
        """Take the references, or run the network on those that are images.

        Args:
            outputs: one, of (N, D) or (N, D, 1, 1).
            targets: N `Similarity`.
            score: the similarity s, or as a probability (1 + s) / 2.
            run: runs the network.

        Raises:
            TypeError: a target is of another task.
        """
        ((self._name, self._output),) = outputs.items()
        chosen = [target.reference for target in targets if isinstance(target, Similarity)]
        if len(chosen) < len(targets):
            raise TypeError("an embedding model explains similarities")
        self._embeddings = _rows(self._output)
        images = [n for n, reference in enumerate(chosen) if reference.ndim == 3]
        references = [np.asarray(reference, np.float64) for reference in chosen]
        if images:
            found = run(np.stack([chosen[n] for n in images]))[self._name]
            for n, embedding in zip(images, found, strict=True):
                references[n] = embedding.astype(np.float64).ravel()
        # In float64, in which no square of a float32 is zero or infinite.
        self._references = _directions(np.stack(references))
        self._kind = score

    def seed(self, k: int) -> Scores:  # noqa: ARG002 - there is one
        """The derivative of the cosine similarity, (r - s e) / |E|, for directions e of the embedding E and r.

        Zero where both directions are the same but for rounding: nothing raises the similarity then.
        """
        embeddings = self._embeddings.astype(np.float64)
        directions = _directions(embeddings)
        similarity = (directions * self._references).sum(1, keepdims=True)
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        gradient = (self._references - similarity * directions) / np.maximum(lengths, np.finfo(np.float32).tiny)
        same = np.linalg.norm(directions - self._references, axis=1, keepdims=True) <= _SAME
        scaled = np.where(same, 0.0, gradient) * (0.5 if self._kind is Score.PROBABILITY else 1.0)
        return {self._name: scaled.reshape(self._output.shape).astype(self._output.dtype)}

    def scores_of(self, n: int, outputs: Scores) -> Float32Array:
        """Scores (R, 1) of embeddings of R rows with image n's reference."""
        return self.probabilities(n, outputs) if self._kind is Score.PROBABILITY else self._similarities(n, outputs)

    def probabilities(self, n: int, outputs: Scores) -> Float32Array:
        """(1 + s) / 2, (R, 1), of embeddings of R rows with image n's reference."""
        return (1.0 + self._similarities(n, outputs)) / 2.0

    def by_name(self, n: int) -> Similarity:
        """The reference's embedding."""
        return Similarity(self._references[n].astype(np.float32))

    def least_probable(self, n: int) -> None:
        """Embeddings have no such thing."""

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's embedding, similarity and map."""
        # Rounding may leave [-1, 1].
        logit = float(np.clip(self._similarities(n, {self._name: self._output[n : n + 1]}), -1.0, 1.0)[0, 0])
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=(0,),
            maps=maps,
            scales=scales,
            offsets=offsets,
            findings=(Finding(0, logit, (1.0 + logit) / 2.0),),
            embedding=self._embeddings[n],
        )

    def _similarities(self, n: int, outputs: Scores) -> Float32Array:
        """Cosine similarities (R, 1), computed in float64."""
        directions = _directions(_rows(outputs[self._name]).astype(np.float64))
        found: Float32Array = (directions @ self._references[n, :, None]).astype(np.float32)
        return found


def _rows(output: Array) -> Float32Array:
    """An output of R images as (R, C)."""
    rows: Float32Array = output.reshape(len(output), -1).astype(np.float32, copy=False)
    return rows


def _directions(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Vectors (N, D) of length 1; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: npt.NDArray[np.float64] = vectors / np.where(lengths == 0, 1.0, lengths)
    return found


def goals_of(outputs: Scores, targets: Sequence[Target], *, about: NetworkInfo, score: Score, run: RunImages) -> Goals:
    """Find what is asked for in what a network returned.

    Args:
        outputs: of N images.
        targets: N targets.
        about: the network.
        score: what is explained about a target.
        run: runs the network on further images.

    Raises:
        TypeError: a target is of another task.
    """
    if about.detector is not None:
        size_px = about.preprocess.input_px
        return BoxGoals(outputs, targets, detector=about.detector, size_px=size_px, score=score)
    if about.task is Task.SEGMENTATION:
        return PixelGoals(outputs, targets, score=score, threshold=about.threshold)
    if about.task.traits.has_image_classes:
        return ClassGoals(outputs, targets, task=about.task, score=score)
    if about.task.traits.has_values:
        return ValueGoals(outputs, targets)
    return SimilarityGoals(outputs, targets, score=score, run=run)
