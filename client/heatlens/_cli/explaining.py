"""What the commands that explain share: options that say how maps are made, and reading them."""

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import typer

from heatlens._exceptions import InvalidArgumentError
from heatlens._wire.requests import ALL, ReferenceSource

ModelOption: TypeAlias = Annotated[str | None, typer.Option(show_default="the server's", help="A served model.")]
ClassOption: TypeAlias = Annotated[
    list[int] | None, typer.Option("--class", metavar="ID", help="Explain this class. Repeatable.")
]
MethodOption: TypeAlias = Annotated[
    str | None, typer.Option(show_default="the model's", help="grad-cam, layer-cam, ...")
]
LayerOption: TypeAlias = Annotated[
    list[str] | None, typer.Option("--layer", metavar="NAME", help="Explain this layer. Repeatable.")
]
TargetScoreOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        show_default="logit",
        help="What is explained about a class: logit, probability, log-probability or contrast.",
    ),
]
AggregationOption: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="NAME", show_default="mean", help="Several layers' maps become one: mean, max or product."),
]
AugmentOption: TypeAlias = Annotated[
    bool, typer.Option("--augment", help="Average the maps of the image and its mirror image, darker and brighter.")
]
PrincipalOption: TypeAlias = Annotated[
    bool, typer.Option("--principal-component", help="Smooth maps: their first principal component.")
]


def listed(names: str | None) -> list[str] | str | None:
    """Return the names of a comma-separated list; None, and "all", for itself: what all are is the model's business."""
    if names is None or names.strip() == ALL:
        return names and ALL
    return [name.strip() for name in names.split(",")]


def reference_of(path: Path | None) -> ReferenceSource | None:
    """Return what `explain` takes: the embedding of a .npy file, or the path of an image."""
    if path is None or path.suffix != ".npy":
        return path
    try:
        embedding: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InvalidArgumentError.of("reference", f"{path} holds no array: {error}") from None
    return embedding
