"""Running a network to see what its modules return, and again to see which places of that the result depends on."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import Grid, to_map
from heatlens_server.core.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class Trace:
    """One module's run.

    Attributes:
        name: of the module.
        module: itself.
        order: when it returned, counted from 0.
        shape: of the tensor it returned; None if it returned anything else.
        place: numbers the distinct tensors: a container shares its last child's.
    """

    name: str
    module: nn.Module
    order: int
    shape: tuple[int, ...] | None
    place: int

    @property
    def depth(self) -> int:
        """How deep it lies in other modules."""
        return self.name.count(".")


def run(
    module: nn.Module, input_size: tuple[int, int], *, channels: int = 3, as_list: bool = False
) -> tuple[list[Trace], object]:
    """Run a network on one black image.

    Args:
        module: in eval mode; takes float32 (1, C, H, W). Left as it was.
        input_size: (H, W).
        channels: C.
        as_list: whether it takes a list of images (C, H, W) in place of that.

    Returns:
        Every run of every module in it, in the order in which they returned, and what the network returned.

    Raises:
        ModelLoadError: the network fails.
    """
    traces: list[Trace] = []
    # Weak, so that activations are freed as usual; only a tensor that is still alive can be returned again.
    places: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(child: nn.Module, _inputs: object, output: object) -> None:
            shape, place = None, -1 - len(traces)
            if isinstance(output, Tensor):
                shape, place = tuple(output.shape), len(traces)
                known = places.get(id(output))
                if known is not None and known[0]() is output:
                    place = known[1]
                places[id(output)] = (weakref.ref(output), place)
            traces.append(Trace(name, child, len(traces), shape, place))

        return hook

    hooks = [(child, hook_for(name)) for name, child in module.named_modules() if name]
    inputs = torch.zeros(1, channels, *input_size)
    return traces, call(module, list(inputs) if as_list else inputs, hooks)


def depends(
    module: nn.Module,
    input_size: tuple[int, int],
    places: Sequence[tuple[nn.Module, Grid]],
    scores: Callable[[object], Tensor],
    *,
    channels: int = 3,
) -> bool:
    """Whether the scores depend on the image's places in what any of some modules return.

    The network runs with NaN in one place of each of these outputs, and the scores become NaN or not. Unlike a
    gradient, NaN passes weights that are zero, as those of a new head often are; it does not pass where a place is
    not read at all, as all tokens but the class token are not behind the last attention.

    Args:
        module: in eval mode. Left as it was.
        input_size: (H, W).
        places: modules that run once, and how to read what they return; prefix tokens are left as they are.
        scores: finds the scores in what the network returns.
        channels: of the input.

    Raises:
        ModelLoadError: the network fails.
    """

    def hook_for(grid: Grid) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def hook(_child: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            changed = output.clone()
            features = to_map(changed, grid)
            # In the middle, and even: strided layers skip odd places.
            row, column = (size // 4 * 2 for size in features.shape[2:])
            features[:, :, row, column] = float("nan")
            return changed

        return hook

    hooks = [(child, hook_for(grid)) for child, grid in places]
    inputs = torch.zeros(1, channels, *input_size)
    with _nan_passing(module):
        return bool(scores(call(module, inputs, hooks)).isnan().any())


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantised ones, or a network that holds such."""
    return any(".quantized." in f"{type(child).__module__}." for child in module.modules())


@contextlib.contextmanager
def _nan_passing(module: nn.Module) -> Iterator[None]:
    """Let quantised linear layers return NaN wherever they are given NaN: their integers have none, and fail."""
    handles = []
    for child in module.modules():
        if not (is_quantised(child) and type(child).__name__ == "Linear"):
            continue
        rows: list[Tensor] = []

        def take(_child: nn.Module, inputs: tuple[Tensor, ...], rows: list[Tensor] = rows) -> tuple[Tensor, ...]:
            rows.append(inputs[0].isnan().any(-1, keepdim=True))
            return inputs[0].nan_to_num(0.0), *inputs[1:]

        def put(_child: nn.Module, _inputs: object, output: Tensor, rows: list[Tensor] = rows) -> Tensor:
            return output.masked_fill(rows.pop(), float("nan"))

        handles += [child.register_forward_pre_hook(take), child.register_forward_hook(put)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def call(
    module: nn.Module,
    inputs: Tensor | list[Tensor],
    hooks: Sequence[tuple[nn.Module, Callable[..., Tensor | None]]] = (),
) -> object:
    """Run a network without gradients, with hooks on some of its modules, and return what it returns.

    Raises:
        ModelLoadError: the network fails.
    """
    handles = [child.register_forward_hook(hook) for child, hook in hooks]
    try:
        with torch.no_grad():
            output: object = module(inputs)
    # A network is foreign code and may raise anything.
    except Exception as error:
        raise ModelLoadError(
            f"the network fails on an input of {(len(inputs), *inputs[0].shape)} ({type(error).__name__}); "
            "preprocess.crop_px sets its height and width, preprocess.channels its channels"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return output
