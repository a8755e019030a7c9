"""Reading the configuration: a TOML file, environment variables on top, command line options on top of those.

Relative paths in the file are relative to the file's folder, elsewhere to the working directory.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, cast

from pydantic import ValidationError, field_validator, model_validator

from heatlens_server.config.model import EMBEDDED_MODEL, EXPORT_PREFIX, ONNX_PREFIX, WEIGHT_FILE_SUFFIXES, ModelConfig
from heatlens_server.config.section import Section
from heatlens_server.config.server import AdminConfig, ServerConfig
from heatlens_server.config.telemetry import MetricsConfig, TracingConfig
from heatlens_server.core.errors import ConfigError

_PREFIX, _DELIMITER = "HEATLENS_", "__"
_SECTIONS = ("SERVER", "ADMIN", "METRICS", "TRACING")
"""Whose keys may be set by environment variables."""
_PATH_KEYS = frozenset(
    {"token_file", "certificate", "private_key", "client_ca", "labels", "cache_dir", "source_folder"}
)

_EMBEDDED = ModelConfig(name=EMBEDDED_MODEL, source=f"embedded:{EMBEDDED_MODEL}")


class Config(Section):
    """Everything an operator can set."""

    server: ServerConfig = ServerConfig()
    """The server's address, limits and logs."""
    admin: AdminConfig = AdminConfig()
    """Who may change models while the server runs."""
    metrics: MetricsConfig = MetricsConfig()
    """Metrics for Prometheus."""
    tracing: TracingConfig = TracingConfig()
    """Traces for OpenTelemetry."""
    models: tuple[ModelConfig, ...] = (_EMBEDDED,)
    """The served models. Empty: the embedded one."""

    @field_validator("models")
    @classmethod
    def _named_apart(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        for name in dict.fromkeys(model.name for model in models):
            _check_versions(name, [model for model in models if model.name == name])
        return models or (_EMBEDDED,)

    @model_validator(mode="after")
    def _default_exists(self) -> Self:
        names = [model.name for model in self.models]
        if self.server.default_model and self.server.default_model not in names:
            raise ValueError(
                f"server.default_model: there is no model {self.server.default_model!r}, only {', '.join(names)}"
            )
        return self

    @property
    def default_model(self) -> str:
        """The name of the model that answers requests that name none."""
        return self.server.default_model or self.models[0].name


def _check_versions(name: str, versions: Sequence[ModelConfig]) -> None:
    """Check what several versions of one model say of each other. Raises ValueError."""
    known = [model.version for model in versions]
    if len(versions) > 1 and "" in known:
        raise ValueError(f"two models are named {name!r}: each of them needs a version")
    for version in known:
        if known.count(version) > 1:
            raise ValueError(f"two models are named {name!r} and have version {version!r}")
    defaults = [model for model in versions if model.default]
    if len(defaults) > 1:
        found = " and ".join(repr(model.version) for model in defaults)
        raise ValueError(f"one version of the model {name!r} can be its default, not {found}")
    default = (defaults or versions)[0]
    if default.weight:
        raise ValueError(
            f"weight of the model {name!r}, version {default.version!r}: it is the default, which answers what the "
            "weights of other versions leave"
        )
    if sum(model.weight for model in versions) > 1:
        raise ValueError(f"the weights of the versions of the model {name!r} make more than 1")


def load_config(path: Path | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read the configuration: overrides, then HEATLENS_* variables, then the TOML file, then defaults.

    A nested key's variable joins the names with two underscores: HEATLENS_SERVER__LISTEN. HEATLENS_MODELS holds a
    JSON list and replaces the file's.

    Args:
        path: the TOML file; None for none.
        overrides: nested as in the file, or with dotted keys: {"server.listen": "..."}.

    Raises:
        ConfigError: one line per wrong key, each with the key's path as in the file: "models[0].source: ...".
    """
    raw = _read_toml(path) if path is not None else {}
    _check_environment()
    if any(name.upper().startswith(_PREFIX) for name in os.environ):
        # A tenth of the time in which a server starts.
        from heatlens_server.config.environment import read_environment  # noqa: PLC0415

        raw = _merge(raw, read_environment(Config, _PREFIX, _DELIMITER))
    raw = _merge(raw, _nest(overrides or {}))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(e["loc"], e["type"], e["msg"]) for e in error.errors())) from None


def _check_environment() -> None:
    """Refuse variables that are written like a nested setting and are none: a mistyped one may be the token.

    Names without the delimiter are left alone. Kubernetes sets HEATLENS_PORT, HEATLENS_SERVICE_HOST and the like in
    every pod beside a service called heatlens.

    Raises:
        ConfigError: names the first such variable.
    """
    for name in sorted(os.environ):
        upper = name.upper()
        nested = upper.startswith(_PREFIX) and _DELIMITER in upper
        if nested and not upper.startswith(tuple(f"{_PREFIX}{section}{_DELIMITER}" for section in _SECTIONS)):
            raise ConfigError(f"environment variable {name}: there is no such setting")


def _read_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    return cast("dict[str, object]", _anchor(raw, path.resolve().parent))


def _anchor(value: object, folder: Path) -> object:
    """Make the relative paths in a file's tables relative to `folder`, where factories are looked for too."""
    if isinstance(value, list):
        return [_anchor(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    anchored = {
        key: _anchor_text(key, item, folder) if isinstance(item, str) else _anchor(item, folder)
        for key, item in value.items()
    }
    if str(value.get("source", "")).startswith("python:"):
        anchored.setdefault("source_folder", str(folder))
    return anchored


def _anchor_text(key: str, text: str, folder: Path) -> str:
    if (key in _PATH_KEYS and text) or (key == "weights" and text.endswith(WEIGHT_FILE_SUFFIXES)):
        return str(folder / Path(text).expanduser())
    for prefix in (EXPORT_PREFIX, ONNX_PREFIX):
        if key == "source" and text.startswith(prefix) and text != prefix:
            return f"{prefix}{folder / Path(text.removeprefix(prefix)).expanduser()}"
    return text


def _merge(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Lay `above` over `below`, table by table; everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        beneath = merged.get(key)
        merged[key] = _merge(beneath, value) if isinstance(beneath, Mapping) and isinstance(value, Mapping) else value
    return merged


def _nest(overrides: Mapping[str, object]) -> dict[str, object]:
    nested: dict[str, object] = {}
    for key, value in overrides.items():
        item = value
        for part in reversed(key.split(".")):
            item = {part: item}
        nested = _merge(nested, cast("dict[str, object]", item))
    return nested


def _describe(location: tuple[int | str, ...], kind: str, message: str) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if kind == "extra_forbidden":
        message = "unknown key"
    elif kind == "missing":
        message = "is required"
    message = message.removeprefix("Value error, ")
    message = message.replace("Input should be a valid tuple", "expected a list")
    message = message.replace("Path does not point to a file", "the file does not exist")
    message = message.replace("Path does not point to a directory", "the folder does not exist")
    return f"{path}: {message}" if path else message
