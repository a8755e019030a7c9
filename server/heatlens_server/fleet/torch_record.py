"""What the torch engine has for a model and answers to noise: found at its export, kept in the export's folder.

It tells, without torch, what torch can do beside the export. And it tells whether a network still is the one that was
exported: its code may have changed in a file that no key knows of. Scores alone would not do for that: code can change
a gradient and leave every score as it was.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.manifest import Manifest, sha256_of
from heatlens_server.core.engine import Engine, MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds, TopK

_FILE = "torch.npz"
_IMAGES = 2
_CLASSES = 3
# How far logits may be off, relative to the largest, and raw maps, relative to their peak: what another CPU makes of
# them is less.
_LOGITS_TOLERANCE = 1e-4
_MAP_TOLERANCE = 1e-3
# A map whose peak is less than this share of the largest peak is compared relative to that one: rounding decides it.
_FLAT_SHARE = 1e-2


@dataclass(frozen=True, slots=True, eq=False)
class TorchRecord:
    """The torch engine's methods for a model, and its answers to noise.

    Attributes:
        methods: its `info.methods`.
        classes: (N, K), that the maps are of: the most probable ones.
        logits: float32 (N, C).
        maps: float32 (N * K, h, w), relu(raw map) of HiResCAM of the default layer, in which every value of the
            gradient counts.
    """

    methods: tuple[Method, ...]
    classes: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float32]

    def write(self, folder: Path) -> dict[str, str]:
        """Write it to an export's folder.

        Returns:
            The new file's SHA-256 by its name, for `Manifest.files`.
        """
        path = folder / _FILE
        np.savez(path, methods=np.array(self.methods), classes=self.classes, logits=self.logits, maps=self.maps)
        return {_FILE: sha256_of(path)}

    def agrees(self, engine: Engine) -> bool:
        """Whether the torch engine of a network, in fp32, has and answers the same.

        False also if nothing can be compared, as every map is zero.
        """
        other = record_of(engine, self.classes)
        if (other.methods, other.logits.shape, other.maps.shape) != (
            self.methods,
            self.logits.shape,
            self.maps.shape,
        ):
            return False
        peaks = self.maps.max((1, 2), keepdims=True)
        largest = peaks.max()
        units = np.where(peaks > _FLAT_SHARE * largest, peaks, largest)
        unit = np.abs(self.logits).max(1, keepdims=True)
        return bool(
            largest > 0
            # Not "greater than": NaN is not.
            and np.all(np.abs(other.logits - self.logits) <= _LOGITS_TOLERANCE * unit)
            and np.all(np.abs(other.maps - self.maps) <= _MAP_TOLERANCE * units)
        )


def record_of(engine: Engine, classes: npt.NDArray[np.int64] | None = None) -> TorchRecord:
    """Make the record of a torch engine.

    Args:
        engine: of a classifier, in fp32.
        classes: (N, K), to make the maps of; None for the most probable ones.
    """
    info = engine.info
    shape = (_IMAGES, info.input_height_px, info.input_width_px, info.input_channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    targets = (
        [TopK(min(_CLASSES, info.class_count))] * _IMAGES
        if classes is None
        else [ClassIds(tuple(int(class_id) for class_id in row)) for row in classes]
    )
    results = engine.explain(noise, targets, MapSpec(Method.HI_RES_CAM, info.layers[:1], upsample=False))
    raw = [result.maps * result.scales[:, None, None] + result.offsets[:, None, None] for result in results]
    return TorchRecord(
        methods=info.methods,
        classes=np.array([result.class_ids for result in results]),
        logits=np.stack([result.logits for result in results]),
        maps=np.concatenate(raw),
    )


def read_record(folder: Path, manifest: Manifest) -> TorchRecord | None:
    """The record in an export's folder; None if there is none, as in exports that people made.

    Args:
        folder: of the export.
        manifest: of the export, from `read_manifest`: its files are as they were written.
    """
    if _FILE not in manifest.files:
        return None
    with np.load(folder / _FILE, allow_pickle=False) as kept:
        methods = tuple(Method(str(name)) for name in kept["methods"])
        return TorchRecord(methods, kept["classes"], kept["logits"], kept["maps"])
