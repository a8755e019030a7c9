"""Batches of images explained in this process, for tools that bring a table and take one: Ray Data, Spark, pandas.

By the queue, batches and checks of a server, and without gRPC.
"""

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from heatlens_server.api.answer import Answer
from heatlens_server.api.calls import CallGate
from heatlens_server.api.query import Image, MapSize, MapType, Options, Query, Tensor
from heatlens_server.app import Server
from heatlens_server.config import Config, load_config
from heatlens_server.core.errors import ConfigError, HeatlensError, InvalidArgument
from heatlens_server.core.events import Observers
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method

Column = npt.NDArray[Any]

COLUMNS: Final = (
    *("error", "reason", "model", "model_version", "source_width_px", "source_height_px", "region"),
    *("class_ids", "labels", "logits", "probabilities", "values", "areas", "boxes"),
    *("map_height", "map_width", "maps", "map_scales", "map_offsets", "warnings"),
)
"""What is added to a table. docs/batch.md says what each holds."""

_MAP_TYPES: Final = {"float16": MapType.FLOAT16, "uint8": MapType.UINT8, "float32": MapType.FLOAT32}
_AT_ONCE: Final = 64
"""Images under way at once: enough for the batches of any model."""

_CLOSE_S: Final = 5.0


class Explainer:
    """Explains the images of tables. Holds its models, so it is made once: by an actor, a worker, a program.

    `dataset.map_batches(Explainer, compute=ray.data.ActorPoolStrategy(size=2), batch_size=64)`
    """

    def __init__(
        self,
        config: str | os.PathLike[str] | None = None,
        *,
        column: str = "image",
        model: str = "",
        method: str = "",
        layers: Sequence[str] = (),
        top_k: int = 1,
        map_type: str = "float16",
    ) -> None:
        """Load the models of a configuration, and wait until they are ready.

        Args:
            config: a TOML file as for `heatlens-server serve`, with HEATLENS_* variables on top; None: the embedded
                model.
            column: holds the images: bytes of files, paths, or uint8 pixels (height, width, channels).
            model: of the configuration; empty: its default.
            method: how maps are made; empty: the model's.
            layers: to be explained; empty: the model's.
            top_k: how many of the most probable classes are explained.
            map_type: of maps: "float16", "float32" or "uint8".

        Raises:
            ConfigError: the configuration or an argument is wrong.
            HeatlensError: the model cannot be loaded.
        """
        if map_type not in _MAP_TYPES:
            raise ConfigError(f"map_type: expected one of {', '.join(_MAP_TYPES)}, got {map_type!r}")
        if method not in {"", *Method}:
            raise ConfigError(f"method: there is no {method!r}")
        self._column = column
        self._model = model
        self._options = Options(
            method=Method(method) if method else None,
            layers=tuple(layers),
            top_k=top_k,
            map_size=MapSize.LAYER,
            map_type=_MAP_TYPES[map_type],
        )
        settings = load_config(None if config is None else Path(config))
        self._gate = CallGate(Observers())
        self._loop = asyncio.new_event_loop()
        # A daemon: tools that end their workers do not always close what these hold.
        self._thread = threading.Thread(target=self._loop.run_forever, name="explainer", daemon=True)
        self._thread.start()
        self._server = self._run(_server_of(settings))
        try:
            self._run(self._check_model())
        except HeatlensError:
            self.close()
            raise

    def close(self) -> None:
        """Free the models. Idempotent."""
        if self._loop.is_running():
            self._run(self._server.fleet.close(timeout_s=_CLOSE_S))
            self._run(self._loop.shutdown_default_executor())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, Column]:
        """Explain the images of a batch.

        Args:
            batch: columns of equal length.

        Returns:
            Its columns without that of the images, unless these are paths, and `COLUMNS`. An image that cannot be
            explained is a row with `error` and `reason`.

        Raises:
            KeyError: the batch lacks the column.
            HeatlensError: no image could be explained so: a wrong option.
        """
        images = batch[self._column]
        rows = self._run(self._rows(images))
        are_paths = len(images) > 0 and isinstance(images[0], str)
        kept = {name: values for name, values in batch.items() if name != self._column or are_paths}
        return kept | {name: _column([row.get(name) for row in rows]) for name in COLUMNS}

    async def _check_model(self) -> None:
        await self._server.wait_loaded()
        with self._server.fleet.use(self._model):
            pass

    async def _rows(self, images: Column) -> list[dict[str, Any]]:
        free = asyncio.Semaphore(_AT_ONCE)

        async def row(image: object) -> dict[str, Any]:
            async with free:
                try:
                    return await self._explain(await asyncio.to_thread(_image_of, image))
                except InvalidArgument as error:
                    if not any(violation.field.startswith("image") for violation in error.violations):
                        raise
                    return {"error": error.message, "reason": error.reason}
                except OSError as error:
                    return {"error": str(error), "reason": "IMAGE_UNREADABLE"}

        return list(await asyncio.gather(*map(row, images)))

    async def _explain(self, image: Image) -> dict[str, Any]:
        call = self._gate.begin("bulk", peer="", request_id=None)
        query = Query(model=self._model, image=image, options=self._options)
        try:
            row: dict[str, Any] = await self._server.explainer.explain(query, _row_of, timeout_s=None)
        except HeatlensError as error:
            self._gate.end(call, error.reason, error=error)
            raise
        self._gate.end(call, "OK")
        return row

    def _run(self, work: Any) -> Any:  # noqa: ANN401 - a coroutine and what it returns
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _server_of(settings: Config) -> Server:
    server = Server(settings)
    server.load()
    return server


def _image_of(value: object) -> Image:
    if isinstance(value, bytes):
        return Image(encoded=value)
    if isinstance(value, str | os.PathLike):
        return Image(encoded=Path(value).read_bytes())
    pixels = np.asarray(value)
    return Image(pixels=Tensor(str(pixels.dtype).upper(), pixels.shape, np.ascontiguousarray(pixels).tobytes()))


def _row_of(answer: Answer) -> dict[str, Any]:
    found = answer.explanations
    height, width = found[0].map_values.shape if found else (None, None)
    return {
        "model": answer.model,
        "model_version": answer.model_version,
        "source_width_px": answer.image.source_width_px,
        "source_height_px": answer.image.source_height_px,
        "region": _sides(answer.image.region),
        "class_ids": [one.class_score.class_id for one in found],
        "labels": [one.class_score.label for one in found],
        "logits": [one.class_score.logit for one in found],
        "probabilities": [one.class_score.probability for one in found],
        "values": [one.class_score.value for one in found if one.class_score.value is not None] or None,
        "areas": [one.area for one in found],
        "boxes": [_sides(one.box) for one in found if one.box is not None] or None,
        "map_height": height,
        "map_width": width,
        "maps": [one.map_values.tobytes() for one in found],
        "map_scales": [one.map_scale for one in found],
        "map_offsets": [one.map_offset for one in found],
        "warnings": list(answer.warnings),
    }


def _sides(box: PixelBox) -> list[float]:
    return [box.left, box.top, box.right, box.bottom]


def _column(values: list[Any]) -> Column:
    """A column of anything: lists of equal lengths must not become a matrix."""
    column = np.empty(len(values), object)
    column[:] = values
    return column
