"""What every section of the configuration is: frozen, without unknown keys, documented key by key."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_host_and_port(address: str) -> bool:
    """Whether an address is "host:port" with a port from 0 to 65535."""
    host, _, port = address.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and int(port) <= 65535
