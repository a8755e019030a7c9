"""What every section of the configuration is: frozen, without unknown keys, documented key by key."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
