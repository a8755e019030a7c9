"""Checkpoints as training scripts save them: read without running their code, and the state_dict in them found.

Messages name a file without its folder, as clients see them.
"""

import pickletools
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import safetensors.torch
import torch
from torch import Tensor

from heatlens_server.core.errors import ModelLoadError

# Where training scripts put the state_dict inside a checkpoint; the first that is there is taken. timm's scripts put
# the raw weights beside the averaged ones that they evaluate, torchvision's evaluate "model" unless told otherwise.
_NESTED_KEYS = (
    "state_dict_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "network",
    "net",
    "model_ema",
    "params_ema",
    "params",
    "weights",
)
_AVERAGED = frozenset({"state_dict_ema", "ema_state_dict", "model_ema", "params_ema"})
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state_dict that was read from a file.

    Attributes:
        file_name: the file's, without its folder.
        state: names to tensors, as in the file.
        assumption: which of several state_dicts in the file this is, in a sentence; empty if there is one.
    """

    file_name: str
    state: Mapping[str, Tensor]
    assumption: str = ""


def read_checkpoint(path: Path, key: str = "") -> Checkpoint:
    """Read a state_dict from a .safetensors file, or from any file of torch.save's without running any code in it.

    Args:
        path: the file.
        key: where the state_dict is in the file, as "model_ema"; empty to find it under the usual names.

    Raises:
        ModelLoadError: the file is missing, corrupt, holds anything but tensors and plain values, or no state_dict.
    """
    content = _read(path)
    name = path.name
    if key:
        if not isinstance(content, Mapping) or key not in content:
            raise ModelLoadError(f"weights_key: weights file {name!r} has no {key!r}{_keys_of(content)}")
        content = content[key]
        if not _is_state(content):
            raise ModelLoadError(f"weights_key: {key!r} of weights file {name!r} is no state_dict (names to tensors)")
        return Checkpoint(name, _named(content))
    taken = ""
    others: list[str] = []
    # "state_dict" may hold a "model" in turn.
    while not _is_state(content) and isinstance(content, Mapping):
        within = [str(known) for known, value in content.items() if isinstance(value, Mapping) and value]
        usual = [known for known in _NESTED_KEYS if known in within]
        if not usual and len(within) != 1:
            break
        key = usual[0] if usual else within[0]
        taken = f"{taken}.{key}" if taken else key
        others += usual[1:]
        content = content[key]
    if not _is_state(content):
        raise ModelLoadError(
            f"weights file {name!r} holds no state_dict (names to tensors){_keys_of(content)}; if it is in there under "
            f"a name of its own, set weights_key"
        )
    return Checkpoint(name, _named(content), _choice(name, taken, others))


def _choice(file_name: str, taken: str, others: Sequence[str]) -> str:
    if not others:
        return ""
    kind = "averaged weights (EMA)" if taken in _AVERAGED else "weights"
    return (
        f"the {kind} under {taken!r} of {file_name!r} are taken, not those under "
        f"{' or '.join(map(repr, others))}: weights_key names others"
    )


def _is_state(content: object) -> TypeGuard[Mapping[object, Tensor]]:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _named(content: Mapping[object, Tensor]) -> dict[str, Tensor]:
    return {str(name): tensor for name, tensor in content.items()}


def _keys_of(content: object) -> str:
    if not isinstance(content, Mapping):
        return f" but a {type(content).__name__}"
    shown = [f"{str(key)!r}: {type(value).__name__}" for key, value in list(content.items())[:_SHOWN]]
    more = ", ..." if len(content) > _SHOWN else ""
    return f" but {{{', '.join(shown)}{more}}}"


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            # Of TorchScript archives, which are refused.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelLoadError(f"weights file {path.name!r} does not exist") from error
    # The unpicklers raise whatever their parsing raises.
    except Exception as error:
        raise ModelLoadError(
            f"weights file {path.name!r} cannot be read as plain tensors ({type(error).__name__}){_way_out(path)}"
        ) from error


def _way_out(path: Path) -> str:
    """What a file that is no plain tensors holds, and the line of Python that converts it."""
    if _is_torchscript(path):
        return _convert("it is a TorchScript archive", f"torch.jit.load({path.name!r}).state_dict()")
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # Of files of the older format, and of what is no file of torch.save's at all.
    except Exception:
        return "; save model.state_dict(), not the model"
    if not classes:
        return "; save model.state_dict(), not the model"
    shown = ", ".join(sorted(classes)[:_SHOWN]) + (", ..." if len(classes) > _SHOWN else "")
    loaded = f"torch.load({path.name!r}, map_location='cpu', weights_only=False)"
    key = next((f"[{key!r}]" for key in _NESTED_KEYS if key in _strings(path)), "")
    if any(name.startswith("torch.nn.modules.") for name in classes):
        loaded += f"{key}.state_dict()"
    else:
        loaded += key or "['state_dict']"
    return _convert(f"it holds {shown}", loaded)


def _convert(found: str, state: str) -> str:
    return (
        f": {found}; save model.state_dict(), not the model. Where you trust the file, "
        f"`torch.save({state}, 'tensors.pth')` converts it"
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _strings(path: Path) -> set[str]:
    """The short strings in a pickle of torch.save's, found without running it."""
    with zipfile.ZipFile(path) as archive:
        pickle = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        operations = pickletools.genops(archive.read(pickle))
        return {argument for _, argument, _ in operations if isinstance(argument, str)}
