"""What the commands that explain share: the options that say how maps are made."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import typer

from heatlens._exceptions import InvalidArgumentError
from heatlens._wire.requests import ALL, OPTIONS, ReferenceSource

Command = TypeVar("Command", bound=Callable[..., None])

ModelOption: TypeAlias = Annotated[str | None, typer.Option(show_default="the server's", help="A served model.")]

VersionOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--model-version", metavar="VERSION", show_default="the server's", help="A version of the model."),
]


def _option(name: str, kind: Any, *flags: str, **shown: Any) -> Any:  # noqa: ANN401 - a type and what typer makes of it
    return Annotated[kind, typer.Option(*flags, help=OPTIONS[name].help, **shown)]


# The options of `Client.explain` as the command line has them. Their help is in the SDK's table.
_ANNOTATIONS = {
    "top_k": _option("top_k", int | None, metavar="N"),
    "class_ids": _option("class_ids", list[str] | None, "--class", metavar="CLASS"),
    "method": _option("method", str | None, show_default="the model's"),
    "layers": _option("layers", list[str] | None, "--layer", metavar="NAME"),
    "target_score": _option("target_score", str | None, metavar="SCORE", show_default="logit"),
    "aggregation": _option("aggregation", str | None, metavar="NAME", show_default="mean"),
    "augment": _option("augment", bool, "--augment"),
    "principal_component": _option("principal_component", bool, "--principal-component"),
    "direction": _option("direction", str | None, metavar="increase|decrease", show_default="increase"),
    "map_size": _option("map_size", str | None, metavar="SIZE", show_default="layer"),
    "top_predictions": _option("top_predictions", int | None, metavar="N"),
    "faithfulness": _option("faithfulness", str | None, metavar="METRICS"),
    "mask": _option("mask", Path | None, metavar="FILE"),
    "reference": _option("reference", Path | None, metavar="FILE"),
    "min_score": _option("min_score", float | None, metavar="P", show_default="0.5"),
    "return_mask": _option("return_mask", bool, "--return-mask"),
}
SCORE_OPTIONS = ("target_score", "aggregation", "augment", "principal_component")
MAP_OPTIONS = ("top_k", "class_ids", "method", "layers", *SCORE_OPTIONS, "direction", "top_predictions")
IMAGE_OPTIONS = ("map_size", "faithfulness", "mask", "reference", "min_score", "return_mask")


def takes(*names: str, after: str) -> Callable[[Command], Command]:
    """Give a command options of `Client.explain`, which it receives as its `**options`.

    Args:
        names: of the options.
        after: the command's argument that they follow.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        place = [one.name for one in own].index(after) + 1
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if get_args(_ANNOTATIONS[name])[0] is bool else None,
                annotation=_ANNOTATIONS[name],
            )
            for name in names
        ]
        command.__signature__ = signature.replace(parameters=[*own[:place], *added, *own[place:]])  # type: ignore[attr-defined]
        return command

    return decorate


def chosen(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as the SDK takes them.

    Raises:
        InvalidArgumentError: the file of the reference holds no array.
        OSError: it cannot be read.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False and value != []}
    if "class_ids" in given:
        given["class_ids"] = [_class_of(text) for text in given["class_ids"]]
    if "faithfulness" in given:
        given["faithfulness"] = listed(given["faithfulness"])
    if "reference" in given:
        given["reference"] = _reference(given["reference"])
    return given


def _class_of(text: str) -> int | str:
    """Return the class that was named: its id if that is a number, or else its label."""
    try:
        return int(text)
    except ValueError:
        return text


def listed(names: str | None) -> list[str] | str | None:
    """Return the names of a comma-separated list; None and "all" stay as they are: the model says what all are."""
    if names is None or names.strip() == ALL:
        return names and ALL
    return [name.strip() for name in names.split(",")]


def _reference(path: Path) -> ReferenceSource:
    """Return what `explain` takes: the embedding of a .npy file, or the path of an image."""
    if path.suffix != ".npy":
        return path
    try:
        embedding: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InvalidArgumentError.of("reference", f"{path} holds no array: {error}") from None
    return embedding
