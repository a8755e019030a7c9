"""Environment variables as a part of the configuration."""

from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

from heatlens_server.config.model import ModelConfig
from heatlens_server.config.server import ServerConfig
from heatlens_server.config.telemetry import MetricsConfig, TracingConfig
from heatlens_server.core.errors import ConfigError


class _Environment(BaseSettings):
    """The top-level keys; their values are checked later, merged with the others."""

    server: ServerConfig = ServerConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
    models: tuple[ModelConfig, ...] = ()


def read_environment(prefix: str, delimiter: str) -> dict[str, Any]:
    """What environment variables set, nested as in the file.

    Args:
        prefix: of their names.
        delimiter: between the names of a key and of a key in it.

    Raises:
        ConfigError: the value of one cannot be parsed.
    """
    try:
        return EnvSettingsSource(_Environment, env_prefix=prefix, env_nested_delimiter=delimiter)()
    except SettingsError as error:
        raise ConfigError(f"{prefix}* environment variables: " + str(error).split("\n", maxsplit=1)[0]) from error
