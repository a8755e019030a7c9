"""Networks of every shape of graph, for export tests, and what their graphs must return, in float64.

The reference comes from an untouched double copy of the network, image by image, with a full backward pass.
"""

import copy
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.methods import ABSENT, Method, Score
from heatlens_server.maps.methods import raw_map
from loaded_models import MEAN, STD, loaded, noise

PX = 32
CLASSES = 7


class Staged(nn.Module):
    """Three stages, with a connection past the second and a branch in the third. Every stage can be explained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU6(inplace=True))
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.SiLU())
        self.left, self.right = nn.Conv2d(6, 8, 1), nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(6, 4, 1))
        self.last = nn.Hardswish()
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(12 * 4 * 4, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = nn.functional.avg_pool2d(self.middle(x) + x, 4)
        return self.head(self.last(torch.cat([self.left(x), self.right(x)], 1)))


class Tokens(nn.Module):
    """A convolution, then attention over its pixels: what follows the layer has as many rows as images times heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, stride=8)
        self.position = nn.Parameter(torch.randn(1, 16, 16) / 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.block(tokens).mean(1))


class Baked(Staged):
    """Its author wrote the batch size into it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(2, CLASSES)


class Counting(Staged):
    """Changes a buffer in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x) + self.seen * 0


class Repeating(Staged):
    """Runs its middle stage twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = nn.functional.avg_pool2d(self.middle(self.middle(x)), 4)
        return self.head(self.last(torch.cat([self.left(x), self.right(x)], 1)))


class Dangling(Staged):
    """Computes its middle stage and throws it away."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.middle(x)
        x = nn.functional.avg_pool2d(x, 4)
        return self.head(self.last(torch.cat([self.left(x), self.right(x)], 1)))


class Deciding(Staged):
    """Goes one way or the other by what it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if bool(x.mean() > 0) else x)


class InDictionary(Staged):
    """Gives its logits among other things, as networks of other libraries do."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x, "logits": super().forward(x)}


class Edged(Staged):
    """Has units whose inputs are zero but for rounding, and is recorded with them on the other side of zero.

    So are ReLUs that choose otherwise in a graph than in the network: scores are the same, a part of the gradient by
    two equal channels is on or off. Methods that sum over channels before they drop signs do not see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first.append(Twins())
        self.edge = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        with self.first.register_forward_hook(lambda _module, _inputs, output: kept.append(output)):
            logits = super().forward(x)
        left, right = self.edge
        if torch.compiler.is_exporting():
            right = right * (1 - 2.0**-20)
        units = (left * kept[0][:, 0] - right * kept[0][:, 1]).relu()
        return logits + 0.0002 * units.mean((-2, -1))[:, None]


class Twins(nn.Module):
    """The second channel becomes the first."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, :1], x[:, 2:]], 1)


class Untrained(Staged):
    """A head of zeros, as torchvision's ViT has before training: no gradient reaches any layer."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head[-1].weight)


def edged() -> nn.Module:
    """A factory for configurations."""
    return make(Edged).module


def make(kind: Callable[[], nn.Module], *layers: str) -> LoadedModel:
    """A seeded network; its batch statistics are not those of a fresh one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        module = kind()
        for norm in (child for child in module.modules() if isinstance(child, nn.BatchNorm2d)):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.running_mean, 0.0, 0.3)
    return loaded(module, layers or ("last", "middle", "first"), class_count=CLASSES, px=PX)


def pixels(count: int) -> np.ndarray:
    """uint8 (count, PX, PX, 3)."""
    return noise(count, PX, seed=5)


def normalised(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) to what a graph of float input takes, float32 (N, 3, H, W)."""
    values = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), dtype=np.float32)


def truth(
    model: LoadedModel,
    layer: str,
    images: np.ndarray,
    class_ids: np.ndarray,
    method: Method = Method.GRAD_CAM,
    score: Score = Score.LOGIT,
) -> dict[str, np.ndarray]:
    """What a graph should return, in float64; where class_ids (N, K) are ABSENT, zeros."""
    module = copy.deepcopy(model.module).double().requires_grad_(True)
    rows: list[dict[str, Tensor]] = []
    for image, wanted in zip(images, class_ids, strict=True):
        x = torch.from_numpy((image / 255.0 - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1)[None]
        kept: list[Tensor] = []
        hook = module.get_submodule(layer).register_forward_hook(
            lambda _m, _a, out, kept=kept: (kept.append(out), out.clone())[1]
        )
        output = module(x)
        hook.remove()
        logits = output["logits"] if isinstance(output, dict) else output
        gradients = [
            torch.zeros_like(kept[0])
            if class_id == ABSENT
            else torch.autograd.grad(class_scores(logits, torch.tensor([[class_id]]), score), kept, retain_graph=True)[
                0
            ]
            for class_id in wanted.tolist()
        ]
        activations, stacked = kept[0].detach(), torch.stack(gradients, dim=1)
        factors = stacked if method.traits.needs_gradient else stacked.sum((-2, -1))
        finished = saliency([raw_map(method, activations, factors)])
        rows.append(
            {
                "logits": logits.detach(),
                "activations": activations,
                "gradients": stacked,
                "cam": finished.values,
                "cam_scale": finished.scale,
                "cam_offset": finished.offset,
            }
        )
    return {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}


def assert_true(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], *, atol: float = 2e-5) -> None:
    """Every output is as it should be, relative to its largest magnitude, and of several maps not all are flat."""
    assert expected["cam"].max() == 1.0 or expected["cam_scale"].size < 3
    for name, values in found.items():
        if name == "class_id":
            continue
        assert values.shape == expected[name].shape, name
        size = max(float(np.abs(expected[name]).max()), 1e-12)
        np.testing.assert_allclose(values / size, expected[name] / size, atol=atol, err_msg=name)


def run_torch(
    graph: Callable[..., Sequence[Tensor]], names: Sequence[str], image: np.ndarray, class_index: np.ndarray
) -> dict[str, np.ndarray]:
    """Run a graph where no gradient can be taken."""
    with torch.inference_mode():
        values = graph(torch.from_numpy(image), torch.from_numpy(class_index))
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def writes(target: object) -> bool:
    """Whether a node's target is an operator that writes to its input."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def contents(path: Path) -> bytes:
    """The bytes of a file, and of all in it if it is an archive."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"\n".join(archive.read(name) for name in archive.namelist())


def tells_no_path(path: Path) -> bool:
    """Whether a file is free of this machine's folders."""
    here = [str(Path(__file__).parents[2]), str(Path(torch.__file__).parents[1]), "site-packages", ".venv"]
    return not any(place.encode() in contents(path) for place in here)
