"""What an operator can set: one TOML file, environment variables on top, command line options on top of those.

Loads no torch, so that a wrong key is reported at once. Relative paths in the file are relative to the file's folder,
elsewhere to the working directory.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from heatlens_server.cam.catalog import Method
from heatlens_server.environment import check_environment
from heatlens_server.errors import ConfigError
from heatlens_server.imaging.decode import MAX_PIXELS_LIMIT
from heatlens_server.imaging.preprocess import Interpolation

EMBEDDED_MODEL = "efficientnet_lite0"
WEIGHT_FILE_SUFFIXES = (".pth", ".pt", ".safetensors")

_PATH_KEYS = frozenset({"token_file", "certificate", "private_key", "client_ca", "labels"})
_MAX_SIDE_PX = 8192


def _check_listen(address: str) -> str:
    if address.startswith("unix:") and len(address) > len("unix:"):
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError('must be "host:port" with a port from 0 to 65535, or "unix:PATH"')
    return address


def _check_source(source: str) -> str:
    kind, _, rest = source.partition(":")
    if kind == "python":
        if re.fullmatch(r"\w+(\.\w+)*:\w+", rest):
            return source
        raise ValueError('must be "python:package.module:factory"')
    if kind not in {"torchvision", "timm", "embedded"} or not re.fullmatch(r"[\w./-]+", rest):
        raise ValueError('must be "torchvision:NAME", "timm:NAME", "python:package.module:factory" or "embedded:NAME"')
    if kind == "embedded" and rest != EMBEDDED_MODEL:
        raise ValueError(f'the only embedded model is "embedded:{EMBEDDED_MODEL}"')
    return source


def _check_weights(weights: str) -> str:
    if weights.endswith(WEIGHT_FILE_SUFFIXES):
        if not Path(weights).is_file():
            raise ValueError("the file does not exist")
    elif not re.fullmatch(r"\w+", weights):
        raise ValueError(f'must be "default", "none", a name or a {", ".join(WEIGHT_FILE_SUFFIXES)} file')
    return weights


def _parse_size(value: object) -> int | tuple[int, int]:
    """Accept a number of pixels or [height, width]. By hand: a union would report every alternative's error."""
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(sides) != 2 or not all(
        isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= _MAX_SIDE_PX for side in sides
    ):
        raise ValueError(f"must be a number of pixels or [height, width], each from 1 to {_MAX_SIDE_PX}")
    height_px, width_px = cast("list[int]", sides)
    return (height_px, width_px) if isinstance(value, Sequence) else height_px


SizePx = Annotated[int | tuple[int, int], BeforeValidator(_parse_size)]
Fraction = Annotated[float, Field(allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TlsConfig(_Section):
    """Transport security. With `client_ca`, clients must present a certificate that it signed."""

    certificate: FilePath
    """The server's certificate chain, PEM."""
    private_key: FilePath
    """The certificate's private key, PEM."""
    client_ca: FilePath | None = None
    """Certificates that sign clients' certificates, PEM. Unset: clients need no certificate."""


class ServerConfig(_Section):
    """The server's address, limits and logs."""

    listen: Annotated[str, AfterValidator(_check_listen)] = "127.0.0.1:50051"
    """Address to listen on: "host:port", port 0 for any free one, or "unix:PATH"."""
    grace_s: float = Field(default=30.0, ge=0, le=3600)
    """How long running calls may take to finish at shutdown, in seconds."""
    reflection: bool = False
    """Whether clients may list the services by gRPC reflection."""
    max_message_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, le=2**31 - 1)
    """Largest message accepted and sent, in bytes."""
    max_image_pixels: int = Field(default=64_000_000, ge=1, le=MAX_PIXELS_LIMIT)
    """Largest image accepted, width times height."""
    max_queue_length: int = Field(default=256, ge=1, le=1_000_000)
    """Most requests admitted per model and not yet running; more are refused."""
    max_targets: int = Field(default=32, ge=1, le=10_000)
    """Most classes explained in one request."""
    decode_threads: int = Field(default=0, ge=0, le=1024)
    """Threads that decode and resize images. 0: one per core."""
    token: SecretStr | None = Field(default=None, min_length=1)
    """The bearer token that clients must send. Unset, and no `token_file`: none is asked for."""
    token_file: FilePath | None = None
    """A file that holds the bearer token; better than `token` where others can read the configuration."""
    tls: TlsConfig | None = None
    """Transport security. Unset: plain text."""
    log_format: Literal["console", "json"] = "console"
    """Log lines for people or for programs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is logged."""
    default_model: str = ""
    """The model that answers requests that name none. Empty: the first."""

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("set token or token_file, not both")
        return self

    def read_token(self) -> SecretStr | None:
        """Return the bearer token, from the configuration or its file; None if clients need none.

        Raises:
            ConfigError: the file is unreadable or empty.
        """
        if self.token_file is None:
            return self.token
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("server.token_file: cannot be read") from error
        if not token:
            raise ConfigError("server.token_file: is empty")
        return SecretStr(token)


class PreprocessConfig(_Section):
    """How images become the model's input, where it differs from what the model's source says."""

    resize_px: SizePx | None = None
    """The shorter side after resizing, in pixels, or the exact [height, width]. With only `crop_px` set, the ratio
    of the two stays as it was."""
    crop_px: SizePx | None = None
    """The centre crop, in pixels: one number for a square, or [height, width]. The model's input size."""
    mean: tuple[Fraction, Fraction, Fraction] | None = None
    """Subtracted from each RGB channel, for values in [0, 1]."""
    std: tuple[PositiveFraction, PositiveFraction, PositiveFraction] | None = None
    """What each RGB channel is then divided by."""
    interpolation: Interpolation | None = None
    """How images are resampled."""


class BatchingConfig(_Section):
    """How concurrent requests share a run of the model."""

    max_batch_size: int = Field(default=16, ge=1, le=4096)
    """The largest number of images run at once."""
    max_delay_ms: float = Field(default=2.0, ge=0, le=10_000)
    """How long an image may wait for others while the device is busy, in milliseconds."""


class ModelConfig(_Section):
    """One served model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Unique name; what clients ask for."""
    source: Annotated[str, AfterValidator(_check_source)]
    """Where the architecture comes from: "torchvision:NAME", "timm:NAME", "python:package.module:factory" (a function
    without arguments that returns a torch.nn.Module) or "embedded:efficientnet_lite0"."""
    weights: Annotated[str, AfterValidator(_check_weights)] = "default"
    """"default" (the source's own pretrained weights), "none" (random, always the same), the name of a torchvision
    weights enum's member, or a .pth, .pt or .safetensors file."""
    labels: FilePath | None = None
    """Class names: one per line, a JSON list, or a JSON object {"0": "name"}. Unset: the source's, if it has any."""
    layers: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Module names that can be explained, the default first. Empty: found by running the model once."""
    method: Method = Method.GRAD_CAM
    """The method used when a request names none."""
    version: str = Field(default="", max_length=128)
    """What clients see as the model's version. Empty: derived from the weights."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")
    """"auto" (cuda if there is one), "cpu", "cuda" or "cuda:N"."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """The precision the model runs in."""
    engine: Literal["auto", "torch"] = "auto"
    """What runs the model."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """How images become the model's input."""
    batching: BatchingConfig = BatchingConfig()
    """How requests share a run."""

    @field_validator("layers")
    @classmethod
    def _unique_layers(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("names a layer twice")
        return layers


_EMBEDDED = ModelConfig(name=EMBEDDED_MODEL, source=f"embedded:{EMBEDDED_MODEL}")


class Config(_Section):
    """Everything an operator can set."""

    server: ServerConfig = ServerConfig()
    """The server's address, limits and logs."""
    models: tuple[ModelConfig, ...] = (_EMBEDDED,)
    """The served models. Empty: the embedded one."""

    @field_validator("models")
    @classmethod
    def _named_apart(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        names = [model.name for model in models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are named {name!r}")
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


class _Environment(BaseSettings):
    """The top-level keys as environment variables; their values are checked later, merged with the others."""

    model_config = SettingsConfigDict(env_prefix="HEATLENS_", env_nested_delimiter="__")

    server: ServerConfig = ServerConfig()
    models: tuple[ModelConfig, ...] = ()


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
    check_environment()
    try:
        raw = _merge(raw, EnvSettingsSource(_Environment)())
    except SettingsError as error:
        raise ConfigError("HEATLENS_* environment variables: " + str(error).split("\n", maxsplit=1)[0]) from error
    raw = _merge(raw, _nest(overrides or {}))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(e["loc"], e["type"], e["msg"]) for e in error.errors())) from None


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
    """Make the relative paths in a file's tables relative to `folder`."""
    if isinstance(value, list):
        return [_anchor(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(folder / Path(item).expanduser())
        if isinstance(item, str) and (key in _PATH_KEYS or (key == "weights" and item.endswith(WEIGHT_FILE_SUFFIXES)))
        else _anchor(item, folder)
        for key, item in value.items()
    }


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
    message = message.removeprefix("Value error, ").replace("Path does not point to a file", "the file does not exist")
    return f"{path}: {message}" if path else message
