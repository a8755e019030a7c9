"""How what a network returns is read as scores: which part of it, in which shape, and before which activation."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.tasks import Activation, OutputKind

OutputName = str | int
"""A part of what a network returns: a key of a mapping, an attribute, or a place in a tuple or list."""

_APPLIED: Mapping[Callable[..., Any], Activation] = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), Activation.SOFTMAX),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax), Activation.SOFTMAX),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit), Activation.SIGMOID),
    **dict.fromkeys((torch.sigmoid_, Tensor.sigmoid_), Activation.SIGMOID),
    F.logsigmoid: Activation.SIGMOID,
}
"""The functions that networks end in, and what they are of logits, or the logarithm of what."""

_IN_PLACE = frozenset({torch.sigmoid_, Tensor.sigmoid_})

_RESHAPING = frozenset(
    {
        *(torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, torch.flatten, Tensor.flatten),
        *(torch.reshape, Tensor.reshape, Tensor.view, Tensor.__getitem__, Tensor.contiguous, Tensor.float, Tensor.to),
    }
)
"""What may follow such a function: the same is done to its input."""


@dataclass(frozen=True, slots=True)
class OutputReading:
    """How what a network returns becomes scores (N, C): logits of classes, or the elements of an embedding.

    Used wherever a network is run, so that all see the same scores; detectors return boxes instead. Of segmentation the
    scores are (N, C, h, w).

    Attributes:
        part: which part of what the network returns; None: that is a tensor.
        kind: what it holds.
        activation: what made its probabilities of logits; only looked at where it holds some.
        before_activation: whether the network's activation can be seen as it runs. Then logits are its input; otherwise
            they are computed from its result, which has lost the gradient of what float32 rounds to 0 or 1.
        two_sided: whether its one logit z stands for two classes, of the logits -z and z.
        of_pixels: whether there are scores for each pixel.
    """

    part: OutputName | None = None
    kind: OutputKind = OutputKind.LOGITS
    activation: Activation = Activation.SOFTMAX
    before_activation: bool = False
    two_sided: bool = False
    of_pixels: bool = False

    def __call__(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Run a network on (N, channels, H, W).

        Raises:
            ModelLoadError: it returns nothing of the kind.
        """
        if self.before_activation:
            with SeenActivations() as seen:
                output = module(inputs)
            found = part_of(output, self.part)
            before = seen.before(found)
            logits = self._logits(found) if before is None else before[1]
        else:
            found = part_of(module(inputs), self.part)
            logits = found if self.kind is OutputKind.LOGITS else self._logits(found)
        return self.sides(shaped(logits, inputs.shape[0], of_pixels=self.of_pixels))

    def scores(self, output: object) -> Tensor:
        """What a network returned for one image, (1, C): as many as it has outputs, and not yet made logits."""
        return shaped(part_of(output, self.part), 1, of_pixels=self.of_pixels)

    def sides(self, logits: Tensor) -> Tensor:
        """Logits (N, C) of the classes; of both sides (N, 2), if the network has one logit for two."""
        return torch.cat([-logits, logits], dim=1) if self.two_sided else logits

    def _logits(self, values: Tensor) -> Tensor:
        """Logits that have these probabilities or log-probabilities, as far as the values' precision tells.

        Of a softmax the logarithms, which differ from the network's logits by what is added to all classes.
        """
        precise = values.to(torch.promote_types(values.dtype, torch.float32))
        limits = torch.finfo(precise.dtype)
        logs = precise.clamp(min=limits.tiny).log() if self.kind is OutputKind.PROBABILITIES else precise
        if self.activation is Activation.SIGMOID:
            logs = logs.clamp(max=-limits.eps / 2)
            logs = logs - torch.log(-torch.expm1(logs))
        return logs.to(values.dtype)


class SeenActivations(TorchFunctionMode):
    """A context that keeps what goes into every softmax and sigmoid that runs in it.

    A function is told by its result: what follows it in the network, but for a change of shape, is no part of it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Weak, so that activations inside the network are freed as usual.
        self._seen: dict[int, tuple[weakref.ref[Tensor], Activation, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what any function of torch's returns
        """Run a function, and keep its input if it is such an activation."""
        kwargs = kwargs or {}
        activation = _APPLIED.get(func)
        if activation is not None:
            given = args[0] if args else kwargs["input"]
            kept = given.clone() if func in _IN_PLACE else given
            result = func(*args, **kwargs)
            self._keep(result, activation, kept)
            return result
        result = func(*args, **kwargs)
        if func in _RESHAPING and args and result is not args[0] and (found := self.before(args[0])) is not None:
            self._keep(result, found[0], func(found[1], *args[1:], **kwargs))
        return result

    def before(self, result: Tensor) -> tuple[Activation, Tensor] | None:
        """Which activation gave a tensor, and of what; None if none did."""
        entry = self._seen.get(id(result))
        return None if entry is None or entry[0]() is not result else entry[1:]

    def _keep(self, result: Tensor, activation: Activation, given: Tensor) -> None:
        key = id(result)
        self._seen[key] = (weakref.ref(result, lambda _: self._seen.pop(key, None)), activation, given)


def part_of(output: object, part: OutputName | None) -> Tensor:
    """A part of what a network returned.

    Raises:
        ModelLoadError: there is none such, or it is no tensor.
    """
    if part is None:
        found = output
    elif isinstance(part, int):
        places = list(output.values()) if isinstance(output, Mapping) else output
        found = places[part] if isinstance(places, tuple | list) and part < len(places) else None
    else:
        found = output.get(part) if isinstance(output, Mapping) else getattr(output, part, None)
    if isinstance(found, Tensor):
        return found
    if part is None:
        raise ModelLoadError(f"the network must return a tensor, not {type(output).__name__}")
    names = ", ".join(repr(name) for name, _ in parts_of(output)) or "no tensors"
    raise ModelLoadError(f"output: the network's {type(output).__name__} has no tensor {part!r}, only {names}")


def parts_of(output: object) -> Iterator[tuple[OutputName, Tensor]]:
    """Every part of what a network returned that is a tensor, by what `output` of the configuration calls it."""
    if isinstance(output, Mapping):
        named: list[tuple[Any, object]] = list(output.items())
    elif isinstance(output, tuple | list):
        named = list(enumerate(output))
    elif is_dataclass(output):
        named = [(field.name, getattr(output, field.name)) for field in fields(output)]
    else:
        named = list(getattr(output, "__dict__", {}).items())
    for name, value in named:
        if isinstance(name, str | int) and isinstance(value, Tensor):
            yield name, value


def shaped(values: Tensor, count: int, *, of_pixels: bool) -> Tensor:
    """Scores of `count` images as (count, C), or, of pixels, as (count, C, h, w).

    Raises:
        ModelLoadError: they are of another form.
    """
    return _maps_of(values, count) if of_pixels else rows_of(values, count)


def _maps_of(values: Tensor, count: int) -> Tensor:
    """Scores of the pixels of `count` images as (count, C, h, w), with the one channel that may be squeezed out."""
    found = tuple(values.shape)
    if not values.is_floating_point():
        raise ModelLoadError(
            f"a network for segmentation must return the scores that class ids are made of, not {values.dtype} {found}"
        )
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim == 4 and len(values) == count:
        return values
    raise ModelLoadError(
        f"a network for segmentation must return scores of shape (N, classes, h, w), not a tensor of shape {found}; "
        "output says which part of a mapping, an object or a tuple they are"
    )


def rows_of(values: Tensor, count: int) -> Tensor:
    """Scores of `count` images as (count, C): without trailing dimensions of one, and with what was squeezed out.

    Raises:
        ModelLoadError: they are of another form.
    """
    # Sizes are compared, not hashed: those of a network that is recorded for any batch are symbols.
    if values.ndim == 0 or (values.ndim == 1 and (count == 1 or count == values.shape[0])):
        return values.reshape(count, -1)
    if values.ndim > 2 and all(size == 1 for size in values.shape[2:]):
        values = values.flatten(1)
    if values.ndim == 2:
        return values
    raise ModelLoadError(
        f"the network must return logits of shape (N, classes), not a tensor of shape {tuple(values.shape)}"
    )
