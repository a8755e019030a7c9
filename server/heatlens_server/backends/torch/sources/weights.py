"""Fitting a checkpoint's weights to an architecture, and telling versions of weights apart.

Messages name a file without its folder, as clients see them.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.sources.checkpoints import Checkpoint
from heatlens_server.core.errors import ModelLoadError

_log = logging.getLogger(__name__)

# Heads that are only used in training (GoogLeNet, Inception v3, DeepLabV3 and FCN).
_TRAINING_ONLY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")
# Absent from files older than the counter; without effect in eval mode.
_COUNTER = "num_batches_tracked"
# Parts of names that torch.compile and its parallel wrappers add, anywhere in a name.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """A checkpoint's entries under the names of a network.

    Attributes:
        state: names to tensors.
        stripped: what was taken off the names in the file.
        added: what was put before them.
        unused: the file's entries that do not begin with `stripped`.
    """

    state: Mapping[str, Tensor]
    stripped: str = ""
    added: str = ""
    unused: tuple[str, ...] = ()


def fit_names(checkpoint: Checkpoint, own: Mapping[str, Tensor]) -> Fit:
    """Name a checkpoint's entries as a network does: training wraps networks, which puts prefixes before names.

    Names that fit are left alone. Otherwise prefixes are taken off the file's names, and such as all of the network's
    names have are put before them; what names most of the network's entries, in most of their shapes, is taken, if it
    names half of them.

    Raises:
        ModelLoadError: two parts of the file fit equally well.
    """
    state = checkpoint.state
    if not any(_WRAPPERS.intersection(name.split(".")) for name in own):
        state = {".".join(part for part in name.split(".") if part not in _WRAPPERS): state[name] for name in state}
    wanted = [name for name in own if not name.endswith(_COUNTER)]
    if all(name in state for name in wanted):
        return Fit(state)
    common = _common_prefixes(own)
    fits = [
        Fit(
            {added + name.removeprefix(stripped): state[name] for name in state if name.startswith(stripped)},
            stripped,
            added,
            tuple(name for name in state if not name.startswith(stripped)),
        )
        for stripped in ("", *_frequent_prefixes(state, len(wanted)))
        for added in ("", *common)
    ]

    def quality(fit: Fit) -> tuple[int, int]:
        found = [name for name in wanted if name in fit.state]
        return len(found), sum(fit.state[name].shape == own[name].shape for name in found)

    best = max(map(quality, fits))
    if 2 * best[0] < len(wanted):
        return Fit(state)
    chosen = [fit for fit in fits if quality(fit) == best]
    if len({fit.stripped for fit in chosen}) > 1 and best[0] == len(wanted):
        names = " and ".join(repr(fit.stripped) for fit in chosen[:2])
        raise ModelLoadError(
            f"weights file {checkpoint.file_name!r} holds the network twice, under {names}: save the one that is meant"
        )
    return chosen[0]


def _common_prefixes(names: Mapping[str, Tensor]) -> list[str]:
    """The dotted prefixes that all names have, shortest first."""
    return [prefix for prefix, count in _counted_prefixes(names).items() if count == len(names)]


def _frequent_prefixes(names: Mapping[str, Tensor], size: int) -> list[str]:
    """The dotted prefixes of at least half as many names as a network of `size` entries has."""
    return [prefix for prefix, count in _counted_prefixes(names).items() if 2 * count >= size]


def _counted_prefixes(names: Mapping[str, Tensor]) -> Counter[str]:
    return Counter(prefix for name in names for prefix in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))


def build_with_weights(
    build: Callable[[int | None], nn.Module], checkpoint: Checkpoint, *, own_count: int | None = None
) -> nn.Module:
    """Build an architecture with as many classes as its weights file has, and load the file.

    Args:
        build: makes the architecture with so many classes; None for its own number.
        checkpoint: the weights file.
        own_count: its own number, if its heads have several outputs per class; None if they have one.

    Raises:
        ModelLoadError: the file is of another architecture.
    """
    module = build(None)
    own = module.state_dict()
    class_count = _other_class_count(own, fit_names(checkpoint, own).state, own_count)
    if class_count is not None:
        module = build(class_count)
    load_weights(module, checkpoint)
    return module


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a module, entry for entry.

    Raises:
        ModelLoadError: an entry is missing, left over or of another shape.
    """
    own = module.state_dict()
    fit = fit_names(checkpoint, own)
    used = {k: v for k, v in fit.state.items() if k in own or not k.startswith(_TRAINING_ONLY)}
    wrong = {name for name in own if name in used and used[name].shape != own[name].shape}
    problems = [
        *_counted("missing", [name for name in own if name not in used and not name.endswith(_COUNTER)]),
        *_counted("not in the network", [name for name in used if name not in own]),
        *_counted(
            "of another shape",
            [f"{n} {tuple(used[n].shape)}, the network's {tuple(own[n].shape)}" for n in own if n in wrong],
        ),
    ]
    if problems:
        names = f"; compared without the prefix {fit.stripped!r} of its names" if fit.stripped else ""
        names += f"; compared with {fit.added!r} before its names" if fit.added else ""
        raise ModelLoadError(
            f"weights file {checkpoint.file_name!r} does not fit the network of {len(own)} entries: "
            f"{'; '.join(problems)}{names}"
        )
    if fit.unused:
        _log.info(
            "%d entries of weights file %r outside %r are not used: %s",
            len(fit.unused),
            checkpoint.file_name,
            fit.stripped,
            _shown(fit.unused),
        )
    module.load_state_dict(used, strict=False)


def _counted(problem: str, names: Sequence[str]) -> list[str]:
    return [f"{len(names)} {problem} ({_shown(names)})"] if names else []


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def weights_version(module: nn.Module) -> str:
    """Return the first 12 hex digits of a SHA-256 over every entry's name, type, shape and bytes.

    Two servers with the same weights say the same, wherever the weights came from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        # Quantised modules have entries of several values.
        for part in value if isinstance(value, tuple) else [value]:
            if isinstance(part, Tensor):
                tensor = part.dequantize() if part.is_quantized else part
                digest.update(f"{name} {part.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(f"{name} {part}\n".encode())
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
