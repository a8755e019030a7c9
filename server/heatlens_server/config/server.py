"""The server's own settings: address, limits, token, transport security, logs, cache."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, FilePath, SecretStr, StringConstraints, model_validator

from heatlens_server.config.section import Section, is_host_and_port
from heatlens_server.core.errors import ConfigError
from heatlens_server.core.preprocess import MAX_PIXELS_LIMIT


def _check_listen(address: str) -> str:
    if address.startswith("unix:") and len(address) > len("unix:"):
        return address
    if not is_host_and_port(address):
        raise ValueError('must be "host:port" with a port from 0 to 65535, or "unix:PATH"')
    return address


_Device = Annotated[str, StringConstraints(pattern=r"^(cpu|cuda:\d{1,3})$")]


class TlsConfig(Section):
    """Transport security. With `client_ca`, clients must present a certificate that it signed."""

    certificate: FilePath
    """The server's certificate chain, PEM."""
    private_key: FilePath
    """The certificate's private key, PEM."""
    client_ca: FilePath | None = None
    """Certificates that sign clients' certificates, PEM. Unset: clients need no certificate."""


class ServerConfig(Section):
    """The server's address, limits and logs."""

    listen: Annotated[str, AfterValidator(_check_listen)] = "127.0.0.1:50051"
    """Address to listen on: "host:port", port 0 for any free one, or "unix:PATH"."""
    socket_mode: str = Field(default="0600", pattern=r"^0[0-7]{3}$")
    """Who may connect to a "unix:" address: the mode of its socket, in octal. "0660": the group as well."""
    grace_s: float = Field(default=20.0, ge=0, le=3600)
    """How long running calls may take to finish at shutdown, in seconds."""
    exit_on_hang: bool = False
    """Whether the server drains and ends with exit code 1 when a model hangs, for orchestrators that start it anew."""
    reflection: bool = False
    """Whether clients may list the services by gRPC reflection."""
    v2: bool = True
    """Whether clients of the open inference protocol (KServe, Triton) are answered, on the same port."""
    max_message_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, le=2**31 - 1)
    """Largest message accepted and sent, in bytes."""
    max_image_pixels: int = Field(default=64_000_000, ge=1, le=MAX_PIXELS_LIMIT)
    """Largest image accepted, width times height."""
    max_queue_length: int = Field(default=256, ge=1, le=1_000_000)
    """Most Explain calls admitted per model and not yet running; more are refused."""
    max_targets: int = Field(default=32, ge=1, le=10_000)
    """Most classes explained in one request."""
    max_model_runs: int = Field(default=100_000, ge=1, le=2**53)
    """Most runs of a model, forward or backward, that explaining one image may take."""
    max_streams: int = Field(default=64, ge=1, le=10_000)
    """Most streams open at a time; more are refused."""
    share_by_host: bool = True
    """Whether hosts share the places in queues and of streams where all are taken: those of whoever holds most are
    given to others. False where some hosts are proxies of many callers, and others are not."""
    refuse_floods: bool = True
    """Whether a host that sends much that belongs to no call, or leaves hundreds of calls a second as soon as they have
    begun, is cut off for a while."""
    max_in_flight: int = Field(default=64, ge=1, le=10_000)
    """Largest window of a stream: frames read and not yet answered."""
    max_connections: int = Field(default=1024, ge=1, le=1_000_000)
    """Most connections held at a time; further ones are closed as they come. Fewer where the limit of open files is."""
    max_calls_per_connection: int = Field(default=256, ge=1, le=1_000_000)
    """Most calls open at a time on one connection; clients keep further ones back until one has ended."""
    idle_timeout_s: float = Field(default=300.0, ge=1, le=86_400)
    """A connection that has had no call for so long is closed, in seconds; clients connect anew by themselves."""
    max_connection_age_s: float = Field(default=0.0, ge=0, le=2_000_000)
    """Age at which a connection takes no further calls, in seconds; those on it go on, and clients connect anew by
    themselves: to servers that are new, too. 0: no such age."""
    max_bytes_in_flight: int = Field(default=1024**3, ge=1024, le=2**50)
    """Most bytes of requests and answers in flight, half of it for each; more are refused."""
    max_connection_bytes_in_flight: int = Field(default=512 * 1024**2, ge=1024, le=2**50)
    """The same of one connection."""
    receive_timeout_s: float = Field(default=60.0, ge=0.1, le=86_400)
    """How long the message of a single request may take to come, in seconds."""
    send_timeout_s: float = Field(default=120.0, ge=0.1, le=86_400)
    """How long an answer may take to be taken, in seconds; then its connection is closed."""
    decode_threads: int = Field(default=0, ge=0, le=1024)
    """Threads that decode and resize images. 0: one per core. As many, of low priority, are for large images."""
    max_decoding_bytes: int = Field(default=1 << 31, ge=1, le=2**63 - 1)
    """Most memory for large images that are decoded or wait for it, in bytes; more are refused."""
    token: SecretStr | None = Field(default=None, min_length=1)
    """The bearer token that clients must send. Unset, and no `token_file`: none is asked for."""
    token_file: FilePath | None = None
    """A file that holds the bearer token; better than `token` where others can read the configuration."""
    tls: TlsConfig | None = None
    """Transport security. Unset: plain text."""
    cache_dir: str = ""
    """Where exported models are kept from one start to the next. Empty: $XDG_CACHE_HOME/heatlens or, without that,
    ~/.cache/heatlens."""
    log_format: Literal["console", "json"] = "console"
    """Log lines for people or for programs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe level that is logged."""
    log_ok_share: float = Field(default=1.0, ge=0, le=1)
    """Of how large a share of the calls that end well a line is logged; all others are always."""
    replaced_streams_s: float = Field(default=300.0, ge=0, le=86_400)
    """How long streams may go on with a model that was replaced, which is kept for them, in seconds."""
    memory_budget_bytes: Mapping[_Device, Annotated[int, Field(gt=0)]] = {}
    """How much the weights of the models on a device may take together, by the device: "cpu", "cuda:0". Beyond that the
    least recently used ones are unloaded until a request asks for them. A device that is not named: no limit."""
    default_model: str = ""
    """The model that answers requests that name none. Empty: the first."""

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("set token or token_file, not both")
        return self

    @property
    def cache_path(self) -> Path | None:
        """The folder that `cache_dir` stands for; None if it lies in a home directory that there is not."""
        try:
            if self.cache_dir:
                return Path(self.cache_dir).expanduser().absolute()
            # The XDG base directory specification: a relative path is invalid and to be ignored.
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))
            return (base if base.is_absolute() else Path.home() / ".cache") / "heatlens"
        except RuntimeError:
            return None

    def read_token(self) -> SecretStr | None:
        """Return the bearer token, from the configuration or its file; None if clients need none.

        Raises:
            ConfigError: the file is unreadable or empty.
        """
        return _read_token(self, "server")


class AdminConfig(Section):
    """Who may load, unload and reload models while the server runs."""

    enabled: bool = False
    """Whether anybody may."""
    token: SecretStr | None = Field(default=None, min_length=1)
    """The bearer token of administrators, which they send in place of `server.token`."""
    token_file: FilePath | None = None
    """A file that holds that token."""
    client_names: tuple[str, ...] = ()
    """With `server.tls.client_ca`: names (common or alternative) of clients' certificates that need no token."""

    @model_validator(mode="after")
    def _has_an_administrator(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("set token or token_file, not both")
        if self.enabled and self.token is None and self.token_file is None and not self.client_names:
            raise ValueError("enabled needs token, token_file or client_names")
        return self

    def read_token(self) -> SecretStr | None:
        """Return the administrators' token; None if there is none. Raises: as `ServerConfig.read_token`."""
        return _read_token(self, "admin")


def _read_token(section: ServerConfig | AdminConfig, name: str) -> SecretStr | None:
    if section.token_file is None:
        return section.token
    try:
        token = section.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}.token_file: cannot be read") from error
    if not token:
        raise ConfigError(f"{name}.token_file: is empty")
    if not (token.isascii() and token.isprintable()) or " " in token:
        # No client could send it.
        raise ConfigError(f"{name}.token_file: holds more than one line of printable ASCII without spaces")
    return SecretStr(token)
