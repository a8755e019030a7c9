"""Environment variables as a part of the configuration."""

import re
from typing import Any

from pydantic import BaseModel, create_model
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

from heatlens_server.core.errors import ConfigError


def read_environment(config: type[BaseModel], prefix: str, delimiter: str) -> dict[str, Any]:
    """What environment variables set, nested as in the file.

    Args:
        config: has the sections; their values are checked later, merged with the others.
        prefix: of their names.
        delimiter: between the names of a key and of a key in it.

    Raises:
        ConfigError: the value of one cannot be parsed.
    """
    try:
        sections: Any = {name: (field.annotation, field) for name, field in config.model_fields.items()}
        settings = create_model("Environment", __base__=BaseSettings, **sections)
        return EnvSettingsSource(settings, env_prefix=prefix, env_nested_delimiter=delimiter)()
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        name = f"{prefix}{field[1].upper()}" if field else f"{prefix}* environment variables"
        raise ConfigError(f"{name}: is no JSON") from error
