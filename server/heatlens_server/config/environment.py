"""Which HEATLENS_* variables are settings."""

import os

from heatlens_server.core.errors import ConfigError

_PREFIX, _DELIMITER = "HEATLENS_", "__"


def check_environment() -> None:
    """Refuse variables that are written like a nested setting and are none: a mistyped one may be the token.

    Names without the delimiter are left alone. Kubernetes sets HEATLENS_PORT, HEATLENS_SERVICE_HOST and the like in
    every pod beside a service called heatlens.

    Raises:
        ConfigError: names the first such variable.
    """
    for name in sorted(os.environ):
        upper = name.upper()
        nested = upper.startswith(_PREFIX) and _DELIMITER in upper
        if nested and not upper.startswith(f"{_PREFIX}SERVER{_DELIMITER}"):
            raise ConfigError(f"environment variable {name}: there is no such setting")
