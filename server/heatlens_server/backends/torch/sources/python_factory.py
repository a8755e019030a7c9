"""The operator's own networks: calling the factory, and taking off what others wrapped around its network."""

import contextlib
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType

import torch
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule

from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.extras import importing


def call_factory(name: str, folder: Path | None) -> nn.Module:
    """Return the network that "package.module:factory" makes, without what compiles or spreads it.

    Torch's generator is seeded before the factory is called.

    Args:
        name: of the factory, a function without arguments.
        folder: where its module, and those that it imports, are looked for first; None for `sys.path` alone.

    Raises:
        ModelLoadError: it cannot be imported, fails, or returns something else; the message names no path.
    """
    module_name, _, factory_name = name.partition(":")
    with _importable(folder):
        _check_loaded(module_name.partition(".")[0], folder)
        # The import and the factory are the operator's code and may raise anything; the text may hold paths.
        try:
            with importing:
                factory = getattr(importlib.import_module(module_name), factory_name)
        except Exception as error:
            raise ModelLoadError(
                f"source: {name!r} cannot be imported ({type(error).__name__}); modules are looked for beside the "
                "configuration file (source_folder) and in PYTHONPATH"
            ) from error
        # What the import drew depends on which model of the module was loaded first.
        torch.manual_seed(0)
        try:
            module = factory()
        except Exception as error:
            raise ModelLoadError(f"source: {name!r} failed ({type(error).__name__})") from error
    if not isinstance(module, nn.Module):
        raise ModelLoadError(f"source: {name!r} must return a torch.nn.Module, not {type(module).__name__}")
    module = unwrapped(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelLoadError(f"source: {name!r} returns a TorchScript module, {_WITHOUT_LAYERS}")
    if _is_exported(module):
        raise ModelLoadError(f"source: {name!r} returns a module of torch.export, {_WITHOUT_LAYERS}")
    return module


_WITHOUT_LAYERS = (
    "whose layers cannot be recorded or differentiated by: return the network that it was made from, with its weights "
    "(load_state_dict takes the state_dict() of the one for the other)"
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network itself, without torch.compile, DataParallel, DistributedDataParallel and averages around it.

    Compiled code would be compiled again whenever a layer is recorded or changed, and may leave out hooks. Modules
    inside the network are unwrapped too.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    for parent in list(module.modules()):
        # A scripted part cannot be changed, and holds none of these.
        if isinstance(parent, torch.jit.ScriptModule):
            continue
        for name, child in list(parent.named_children()):
            if _inner(child) is not None:
                setattr(parent, name, unwrapped(child))
        # Of module.compile(), in place.
        if getattr(parent, "_compiled_call_impl", None) is not None:
            parent._compiled_call_impl = None  # noqa: SLF001 - torch has no way to undo it
        _restore_forward(parent)
    return module


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps; None for all other modules."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    # torch.compile's wrapper has a class that is private, and slow to import.
    inner = module.module if isinstance(module, wrappers) else getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def _restore_forward(module: nn.Module) -> None:
    """Undo torch.compile of a forward method, of the class's or of this module's alone."""
    original = getattr(module.forward, "_torchdynamo_orig_callable", None)
    if original is not None:
        module.forward = original if hasattr(original, "__self__") else MethodType(original, module)


def _is_exported(module: nn.Module) -> bool:
    """Whether a module is a graph of torch's own operators, without the network's modules."""
    return isinstance(module, GraphModule) and any(isinstance(node.target, OpOverload) for node in module.graph.nodes)


@contextlib.contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """Let modules in a folder be found, before all others. One thread at a time loads networks."""
    if folder is None:
        yield
        return
    path = str(folder)
    sys.path.insert(0, path)
    # A file may be younger than the last look into its folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(path)


def _check_loaded(package: str, folder: Path | None) -> None:
    """Raise ModelLoadError if the folder's module or package would be taken for one of the same name elsewhere."""
    if folder is None or package not in sys.modules:
        return
    found = importlib.machinery.PathFinder.find_spec(package, [str(folder)])
    if found is not None and found.origin != getattr(sys.modules[package], "__file__", None):
        raise ModelLoadError(f"source: another module {package!r} is loaded already: rename this one")
