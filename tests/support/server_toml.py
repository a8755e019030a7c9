"""Configurations of servers under test, as TOML."""

import json
from collections.abc import Sequence

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model_toml(
    name: str,
    factory: str | None = None,
    *,
    engine: str | None = "torch",
    layers: Sequence[str] = ("body",),
    max_batch_size: int | None = None,
) -> str:
    """A model of `tiny_models`, whose input is 64x64 pixels.

    Args:
        name: what it is called.
        factory: the function that makes it; the same name if None.
        engine: None: the server chooses.
        layers: which can be explained. Tests that need any export share that of `tiny` with "body" and "stem".
        max_batch_size: None: the default.
    """
    lines = [
        "[[models]]",
        f'name = "{name}"',
        f'source = "python:tiny_models:{factory or name}"',
        f"layers = {json.dumps(list(layers))}",
        f"preprocess = {{ resize_px = 64, crop_px = 64, mean = {list(MEAN)}, std = {list(STD)} }}",
    ]
    if engine is not None:
        lines.append(f'engine = "{engine}"')
    if max_batch_size is not None:
        lines.append(f"batching = {{ max_batch_size = {max_batch_size} }}")
    return "\n".join(lines)


def server_toml(*models: str, **server: object) -> str:
    """A server on a free port, with keys of the section `server` and models as `model_toml` writes them."""
    keys = {"listen": "127.0.0.1:0", **server}
    return "\n".join(["[server]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items()), *models, ""])
