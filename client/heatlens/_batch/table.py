"""The table of a batch: one row per image, written in parts that outlive an interruption."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from heatlens._batch.run import Answer, MapType
from heatlens._exceptions import InvalidArgumentError
from heatlens._results.results import Explanation, Result

_PART_ROWS: Final = 1000
_OPTIONS: Final = b"heatlens.options"

SCHEMA: Final = pa.schema(
    [
        ("path", pa.string()),
        ("error", pa.string()),
        ("reason", pa.string()),
        ("model", pa.string()),
        ("model_version", pa.string()),
        ("source_width_px", pa.int32()),
        ("source_height_px", pa.int32()),
        ("region", pa.list_(pa.float32())),
        ("class_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.string())),
        ("logits", pa.list_(pa.float32())),
        ("probabilities", pa.list_(pa.float32())),
        ("values", pa.list_(pa.float32())),
        ("areas", pa.list_(pa.float32())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("map_height", pa.int32()),
        ("map_width", pa.int32()),
        ("maps", pa.list_(pa.binary())),
        ("map_scales", pa.list_(pa.float32())),
        ("map_offsets", pa.list_(pa.float32())),
        ("warnings", pa.list_(pa.string())),
    ]
)
"""docs/batch.md says what the columns hold."""


def row_of(path: str, answer: Answer, map_type: MapType) -> dict[str, Any]:
    """Return one row: an answer, or why there is none."""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    row["path"] = path
    if not isinstance(answer, Result):
        row["error"] = getattr(answer, "message", None) or str(answer)
        row["reason"] = getattr(answer, "reason", "IMAGE_UNREADABLE")
        return row
    found = answer.explanations
    if answer.source_size is not None:
        row["source_width_px"], row["source_height_px"] = answer.source_size
    if found and map_type is not MapType.NONE:
        row["map_height"], row["map_width"] = found[0].heatmap.values.shape
        row["maps"] = [_map_bytes(one, map_type) for one in found]
    if any(one.value is not None for one in found):
        row["values"] = [one.value for one in found]
    if any(one.box is not None for one in found):
        row["boxes"] = [one.box and [one.box.left, one.box.top, one.box.right, one.box.bottom] for one in found]
    region = answer.source_region
    return row | {
        "model": answer.model,
        "model_version": answer.model_version,
        "region": [region.left, region.top, region.right, region.bottom],
        "class_ids": [one.class_id for one in found],
        "labels": [one.label for one in found],
        "logits": [one.logit for one in found],
        "probabilities": [one.probability for one in found],
        "areas": [one.area for one in found],
        "map_scales": [one.heatmap.scale for one in found],
        "map_offsets": [one.heatmap.offset for one in found],
        "warnings": list(answer.warnings),
    }


def _map_bytes(one: Explanation, map_type: MapType) -> bytes:
    values = one.heatmap.values
    return (np.rint(values * 255).astype("u1") if map_type is MapType.UINT8 else values.astype("<f2")).tobytes()


class Table:
    """Rows on their way to one Parquet file.

    Until it is finished, they are in files of a folder beside it, OUT.parts, each complete: an interruption loses none
    of them.
    """

    def __init__(self, path: Path, options: Mapping[str, object], *, map_type: MapType, overwrite: bool) -> None:
        """Begin, or go on where the same batch was interrupted.

        Args:
            path: the file.
            options: what is asked for: a batch is gone on with by the same.
            map_type: of maps.
            overwrite: whether what is there goes: a file, or an interrupted batch.

        Raises:
            InvalidArgumentError: there is a file, or a batch with other options; or one that runs.
            OSError: the folder cannot be written to.
        """
        self.path = path
        self._map_type = map_type
        self._folder = path.with_name(f"{path.name}.parts")
        said = json.dumps({**options, "map_type": map_type}, sort_keys=True)
        self._schema = SCHEMA.with_metadata({_OPTIONS: said.encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise InvalidArgumentError.of("--output", f"another batch is writing {path}") from None
        if overwrite:
            shutil.rmtree(self._folder, ignore_errors=True)
        elif path.exists():
            raise InvalidArgumentError.of("--output", f"{path} is there already; --overwrite replaces it")
        self._folder.mkdir(exist_ok=True)
        self._rows: list[dict[str, Any]] = []
        self._parts = sorted(self._folder.glob("part-*.parquet"))
        self.failed = 0
        self.done = 0
        for part in self._parts:
            try:
                metadata = pq.read_metadata(part)
            except pa.ArrowInvalid:
                raise InvalidArgumentError.of("--output", f"{part} is damaged; --overwrite begins anew") from None
            if (before := (metadata.metadata or {}).get(_OPTIONS, b"").decode()) != said:
                raise InvalidArgumentError.of(
                    "--output", f"{self._folder} is of a batch with other options, {before}; --overwrite begins anew"
                )
            self.done += metadata.num_rows
            self.failed += pq.read_table(part, columns=["error"]).column(0).drop_null().length()

    @property
    def last_path(self) -> str | None:
        """The last image that is done; None before the first."""
        if not self._parts:
            return None
        last: str = pq.read_table(self._parts[-1], columns=["path"]).column(0)[-1].as_py()
        return last

    def add(self, path: str, answer: Answer) -> None:
        """Add a row."""
        row = row_of(path, answer, self._map_type)
        self.done += 1
        self.failed += row["error"] is not None
        self._rows.append(row)
        if len(self._rows) >= _PART_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was added as one more part."""
        if self._rows:
            part = self._folder / f"part-{len(self._parts):06d}.parquet"
            table = pa.Table.from_pylist(self._rows, schema=self._schema)
            self._write(part, [table])
            self._parts.append(part)
            self._rows = []

    def finish(self) -> None:
        """Make one file of the parts."""
        self.flush()
        # One at a time: a million maps do not fit into memory.
        self._write(self.path, map(pq.read_table, self._parts))
        shutil.rmtree(self._folder)
        self.close()

    def close(self) -> None:
        """Let others write it. Idempotent."""
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def _write(self, path: Path, tables: Any) -> None:  # noqa: ANN401 - an iterable of pyarrow's tables
        unfinished = path.with_name(f".{path.name}.tmp")
        with pq.ParquetWriter(unfinished, self._schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        unfinished.replace(path)
