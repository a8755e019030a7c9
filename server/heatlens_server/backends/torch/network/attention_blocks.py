"""The blocks of a transformer, each with a score of its own and its attention matrices: what LeGrad looks at.

The score of a block is what the network's end (last norm, pooling, head) makes of the mean of the block's tokens. One
run gives the scores of all: the last block hands on the mean tokens of every block as further rows of the batch, each
in the place of all tokens, so that it does not matter which of them the end pools.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import LayerOutput
from heatlens_server.backends.torch.network.attention import open_attention
from heatlens_server.backends.torch.network.hooks import LayerHooks, Recording, Substitution
from heatlens_server.core.grid import Grid, Layout

_log = logging.getLogger(__name__)

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""What logits may differ by, relative to the largest, when attention is computed in another way."""


class _BlockRecording(Recording):
    """Cuts the graph between blocks, so that a block's score depends on its own attention only."""

    __slots__ = ("_last", "_tokens")

    def __init__(self, blocks: Sequence[str]) -> None:
        super().__init__()
        self._last = blocks[-1]
        self._tokens: list[Tensor] = []

    def pass_on(self, layer: str, output: LayerOutput) -> LayerOutput:
        """Keep a block's tokens; after the last block, hand on those of all blocks."""
        if not isinstance(output, Tensor) or output.ndim != 3:
            raise TypeError("blocks must return tokens (N, T, C)")
        self._tokens.append(output)
        if layer != self._last:
            return output.detach()
        means = [tokens.mean(dim=1, keepdim=True).expand_as(tokens) for tokens in self._tokens]
        return torch.cat([*means, output.detach()])


class AttentionRecorder:
    """The hooks on a network's blocks.

    Attributes:
        blocks: their names, in the order they run.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str], tokens: int) -> None:
        """Register the hooks.

        Args:
            module: the network.
            blocks: names of its blocks, at least one.
            tokens: how many tokens there are, T.
        """
        self.blocks = tuple(blocks)
        self._tokens = tokens
        self._hooks = LayerHooks(module, blocks)

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run the network.

        Args:
            run: runs it on N images.

        Returns:
            Its output for the N images; its output for every block, block by block (blocks * N rows), attached to the
            graph; the attention matrices (..., T, T), leaves of that graph, of which each block's rows depend on its
            own.
        """
        leaves: list[Tensor] = []

        def cut(matrix: Tensor) -> Tensor:
            if not _is_square(matrix, self._tokens):
                return matrix
            leaves.append(matrix.detach().requires_grad_())
            return leaves[-1]

        with self._hooks.active(_BlockRecording(self.blocks)), Substitution(open_attention(cut)):
            output = run()
        n = len(output) // (len(self.blocks) + 1)
        return output[-n:].detach(), output[:-n], leaves

    def remove(self) -> None:
        """Take the hooks off the network. Idempotent."""
        self._hooks.remove()


def find_attention(
    module: nn.Module, run: Callable[[Tensor], Any], inputs: Tensor, grid: Grid
) -> AttentionRecorder | None:
    """Find the blocks of a transformer.

    Args:
        module: the network.
        run: runs it on inputs.
        inputs: (2, C, H, W): two different images, so that rows that do not belong together do not go unnoticed.
        grid: how the tokens of its default layer lie on the image.

    Returns:
        A recorder that was tried; None for a network without tokens on a grid, whose attention is windowed or pooled,
        that is no sequence of blocks, or whose end does not run on more rows than its beginning.
    """
    if grid.layout is not Layout.TOKENS:
        return None
    tokens = grid.prefix + grid.height * grid.width
    blocks = _blocks(module, lambda: run(inputs), tokens)
    if not blocks:
        return None
    recorder = AttentionRecorder(module, blocks, tokens)
    try:
        if _works(recorder, lambda: run(inputs), run(inputs)):
            return recorder
    except torch.OutOfMemoryError:
        recorder.remove()
        raise
    # In foreign code, shapes that do not fit may raise anything.
    except Exception:
        _log.debug("the end of this network does not run on the tokens of its blocks", exc_info=True)
    recorder.remove()
    return None


def _blocks(module: nn.Module, run: Callable[[], Any], tokens: int) -> tuple[str, ...]:
    """The names of the modules that differ first on the ways to where attention (..., T, T) is computed."""
    way: list[str] = []
    callers: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: way.append(name)

    def leave(*_: object) -> None:
        way.pop()

    def note(matrix: Tensor) -> Tensor:
        if _is_square(matrix, tokens):
            callers.append(way[-1])
        return matrix

    handles = []
    for name, child in module.named_modules():
        handles += [child.register_forward_pre_hook(enter(name)), child.register_forward_hook(leave)]
    try:
        with Substitution(open_attention(note)), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    ways = [caller.split(".") for caller in dict.fromkeys(callers)]
    if len(ways) < 2:
        return ()
    shared = next((place for place, names in enumerate(zip(*ways, strict=False)) if len(set(names)) > 1), None)
    return () if shared is None else tuple(dict.fromkeys(".".join(parts[: shared + 1]) for parts in ways))


def _works(recorder: AttentionRecorder, run: Callable[[], Tensor], expected: Any) -> bool:  # noqa: ANN401
    if not isinstance(expected, Tensor):
        return False
    output, scored, leaves = recorder.record(run)
    if output.shape != expected.shape or len(scored) != len(recorder.blocks) * len(expected):
        return False
    tolerance = _TOLERANCES.get(expected.dtype, 1e-3) * float(expected.abs().amax())
    if not float((output - expected.detach()).abs().amax()) <= tolerance:
        return False
    gradients = torch.autograd.grad(scored.sum(), leaves, allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def _is_square(matrix: Tensor, tokens: int) -> bool:
    return matrix.shape[-2:] == (tokens, tokens)
