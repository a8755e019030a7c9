"""LeGrad against `torchcam` 0.5.0 and against block after block by hand; which networks it is offered for."""

import pytest
import torch
from torch import nn
from torchcam.methods import LeGrad

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import hook_count, noise, without_hooks
from one_pass_models import assert_parity, placed, raw, top
from tiny_models import tiny
from tiny_transformers import NETWORKS, transformer


def test_parity_with_torchcam():
    model = placed(transformer("vit-torchvision"))
    images = noise(2)
    targets = top(model, images)
    (maps,) = raw(model, images, targets, Method.LE_GRAD)
    module = without_hooks(model.module)
    with LeGrad(module, list(module.encoder.layers)) as explainer:
        for k in range(2):
            scores = module(model.inputs(images))
            (found,) = explainer([target.ids[k] for target in targets], scores, normalized=False)
            assert_parity("le-grad vit-torchvision torchcam", maps[:, k], found)


def by_hand(module, inputs, class_id, prefix, end):
    """Every block alone, in float64, with timm's attention written out: the dropout after it sees the matrix."""
    module = without_hooks(module).double()
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False
    entering = []
    handles = [block.register_forward_pre_hook(lambda _m, args: entering.append(args)) for block in module.blocks]
    shared = {}
    handles.append(
        module.blocks[0].register_forward_pre_hook(lambda _m, _a, kwargs: shared.update(kwargs), with_kwargs=True)
    )
    with torch.no_grad():
        module(inputs.double())
    for handle in handles:
        handle.remove()
    maps = []
    for block, args in zip(module.blocks, entering, strict=True):
        matrices = []

        def keep(_module, _args, matrix, matrices=matrices):
            matrices.append(matrix.detach().requires_grad_())
            return matrices[0]

        handle = block.attn.attn_drop.register_forward_hook(keep)
        tokens = block(*args, **shared)
        handle.remove()
        score = end(module, tokens.mean(1))[:, class_id].sum()
        (gradient,) = torch.autograd.grad(score, matrices)
        maps.append(gradient.clamp(min=0).mean((1, 2))[:, prefix:])
    return torch.stack(maps).mean(0).unflatten(1, (4, -1))


@pytest.mark.parametrize(
    ("name", "prefix", "end"),
    [
        ("vit", 1, lambda net, mean: net.head(net.norm(mean))),
        ("vit-registers", 5, lambda net, mean: net.head(net.norm(mean))),
        # Not square, and read by the class token and a token of distillation.
        ("vit-oblong", 1, lambda net, mean: net.head(net.norm(mean))),
        ("deit-distilled", 2, lambda net, mean: (net.head(net.norm(mean)) + net.head_dist(net.norm(mean))) / 2),
        # A bias by position, which is a mask of the fused attention.
        ("beit", 1, lambda net, mean: net.head(net.fc_norm(mean))),
    ],
)
def test_blocks_by_hand(name, prefix, end):
    size = (64, 96) if name == "vit-oblong" else (NETWORKS[name][0],) * 2
    net = transformer(name)
    model = placed(net, px=size)
    images = noise(2, 96)[:, : size[0], : size[1]].copy()
    (maps,) = raw(model, images, [ClassIds((3,))] * 2, Method.LE_GRAD)
    assert_parity(f"le-grad {name} by hand", maps[:, 0], by_hand(net, model.inputs(images), 3, prefix, end))


def test_attention_written_out_is_the_same():
    fused, written = transformer("vit"), transformer("vit")
    for block in written.blocks:
        block.attn.fused_attn = False
    images, targets = noise(2), [ClassIds((1, 2))] * 2
    maps, expected = (raw(placed(net), images, targets, Method.LE_GRAD)[0] for net in (written, fused))
    torch.testing.assert_close(maps, expected)


def test_the_network_itself_says_which_class_is_most_probable():
    model, images = placed(transformer("vit")), noise(3)
    expected = model.run_images(images)
    output, of_blocks, _ = model.attention.record(lambda: model.run(model.inputs(images)))
    assert of_blocks.shape == (4 * 3, 7)
    assert not of_blocks[-3:].allclose(expected, rtol=0.1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


class Skipping(nn.Module):
    """A transformer whose end looks back at what came before the blocks: it runs on no more rows than that."""

    def __init__(self):
        super().__init__()
        self.inner = transformer("vit")

    def forward(self, x):
        early = self.inner.patch_embed(x)
        return self.inner.forward_head(self.inner.forward_features(x)) + early.mean((1, 2))[:, None]


@pytest.mark.parametrize(
    ("make", "offered"),
    [
        (tiny, False),
        (lambda: transformer("swin"), False),
        (lambda: transformer("swin-torchvision"), False),
        (lambda: transformer("hiera"), False),
        (lambda: transformer("convnext"), False),
        (Skipping, False),
        (lambda: transformer("vit-averaged"), True),
        (lambda: transformer("vit-pooled"), True),
        (lambda: transformer("vit-torchvision"), True),
    ],
)
def test_it_is_offered_where_attention_is_over_the_grid(make, offered):
    module = make()
    model = placed(module)
    engine = TorchEngine(model.model)
    assert (Method.LE_GRAD in engine.info.methods) is offered
    model.close()
    engine.close()
    assert hook_count(module) == 0


def test_without_blocks_it_says_so():
    with pytest.raises(ValueError, match="no blocks"):
        raw(placed(tiny()), noise(1), [ClassIds((1,))], Method.LE_GRAD)
