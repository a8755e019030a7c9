"""Weight files: reading them safely, fitting them to an architecture, and telling versions apart.

Messages name a file without its folder, as clients see them.
"""

import hashlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from heatlens_server.core.errors import ModelLoadError

# Where training scripts put the state_dict inside a checkpoint.
_NESTED_KEYS = ("state_dict", "model_state_dict", "model")
# Heads that are only used in training (GoogLeNet, Inception v3, DeepLabV3 and FCN).
_TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
# Absent from files older than the counter; without effect in eval mode.
_COUNTER = "num_batches_tracked"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state_dict from a .safetensors file, or from a .pth or .pt file without running any code in it.

    Checkpoints that hold the state_dict under "state_dict", "model_state_dict" or "model" are unwrapped, and a
    "module." in front of every name (DataParallel) is removed.

    Raises:
        ModelLoadError: the file is missing, corrupt, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelLoadError(f"weights file {path.name!r} does not exist") from error
    # The unpicklers raise whatever their parsing raises.
    except Exception as error:
        raise ModelLoadError(
            f"weights file {path.name!r} cannot be read as plain tensors ({type(error).__name__}); "
            "save model.state_dict(), not the model"
        ) from error
    for key in _NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelLoadError(f"weights file {path.name!r} holds no state_dict (names to tensors)")
    state = {str(name): tensor for name, tensor in content.items()}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def build_with_weights(
    build: Callable[[int | None], nn.Module], path: Path, *, own_count: int | None = None
) -> nn.Module:
    """Build an architecture with as many classes as its weights file has, and load the file.

    Args:
        build: makes the architecture with so many classes; None for its own number.
        path: the weights file.
        own_count: its own number, if its heads have several outputs per class; None if they have one.

    Raises:
        ModelLoadError: the file is unreadable or of another architecture.
    """
    state = read_weights(path)
    module = build(None)
    class_count = _other_class_count(module.state_dict(), state, own_count)
    if class_count is not None:
        module = build(class_count)
    load_weights(module, state, path.name)
    return module


def load_weights(module: nn.Module, state: Mapping[str, Tensor], file_name: str) -> None:
    """Load a state_dict into a module, entry for entry.

    Raises:
        ModelLoadError: an entry is missing, left over or of another shape.
    """
    own = module.state_dict()
    used = {k: v for k, v in state.items() if k in own or not k.startswith(_TRAINING_ONLY)}
    problems = [f"{name} is missing" for name in own if name not in used and not name.endswith(_COUNTER)]
    problems += [f"{name} is not in the network" for name in used if name not in own]
    problems += [
        f"{name} has shape {tuple(used[name].shape)}, the network's {tuple(own[name].shape)}"
        for name in own
        if name in used and used[name].shape != own[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelLoadError(f"weights file {file_name!r} does not fit the network: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(used, strict=False)


def weights_version(module: nn.Module) -> str:
    """Return the first 12 hex digits of a SHA-256 over every entry's name, type, shape and bytes.

    Two servers with the same weights say the same, wherever the weights came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _other_class_count(own: Mapping[str, Tensor], state: Mapping[str, Tensor], own_count: int | None) -> int | None:
    """Return the file's number of classes if the network fits but for the first dimensions of its heads."""
    different = [name for name in own if name in state and state[name].shape != own[name].shape]
    if any(
        0 in {own[name].ndim, state[name].ndim} or state[name].shape[1:] != own[name].shape[1:] for name in different
    ):
        return None
    counts = {
        # A head of so many outputs per class, as a detector's for boxes or anchors.
        Fraction(state[name].shape[0], own[name].shape[0] if own_count is not None else 1) * (own_count or 1)
        for name in different
    }
    if len(counts) != 1:
        return None
    (count,) = counts
    return int(count) if count.denominator == 1 else None
