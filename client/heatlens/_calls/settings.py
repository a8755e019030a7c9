"""How to reach a server: checked settings, and the gRPC channel options that follow from them."""

import json
import re
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from os import PathLike
from typing import Final, TypeAlias

import grpc

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.images import checked_path
from heatlens._version import __version__
from heatlens._wire.arguments import MAX_SECONDS, as_float, checked_int, checked_timeout, is_text
from heatlens._wire.status import REQUEST_ID_KEY
from heatlens._wire.target import credentials, is_loopback, target_of

DEFAULT_MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_KEY = re.compile(r"(?!grpc-|authorization$|x-request-id$|trace(parent|state)$)[a-z0-9_.-]+(?<!-bin)")
"""A key of metadata for text that neither gRPC nor the client uses."""


class Unset(Enum):
    """Marks an argument that is not given. None means "no limit"."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
Timeout: TypeAlias = float | Unset | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How to encrypt, and which certificates to trust.

    Attributes:
        ca_file: PEM file with the certificate authorities to trust. None: those that come with gRPC.
        cert_file: PEM file with this client's certificate chain, for servers that ask for one.
        key_file: PEM file with its private key. Given if and only if `cert_file` is.
        server_name: the name that the server's certificate must have. None: the host of the address.
    """

    ca_file: str | PathLike[str] | None = None
    cert_file: str | PathLike[str] | None = None
    key_file: str | PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidArgumentError.of("tls", "give both of cert_file and key_file, or none")
        for name in (self.ca_file, self.cert_file, self.key_file):
            if name is not None:
                checked_path("tls", name)
        if self.server_name is not None and not is_text(self.server_name):
            raise InvalidArgumentError.of("tls", f"expected server_name to be a name, got {self.server_name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a call is tried again: on UNAVAILABLE and RESOURCE_EXHAUSTED, within the call's timeout.

    On Ray it is tried again too, at once, when the replica that answers dies.

    The wait before attempt n is about initial_backoff_s * multiplier ** (n - 2), at most max_backoff_s, give or take
    20 %. If the server says how long to wait, or not to try again, that counts instead.

    RESOURCE_EXHAUSTED is tried again because a full queue drains within moments, and the server says when. gRPC uses
    the same code for messages that are too large: the SDK measures requests beforehand, as no retry helps there.

    Attributes:
        max_attempts: attempts in all, 1 (no retries) to 5 (gRPC's own limit).
        initial_backoff_s: the first wait, in seconds, at least a millisecond.
        max_backoff_s: the longest wait, in seconds, at most 1e9.
        multiplier: growth of the wait, 0.001 to 1000.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.1
    max_backoff_s: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        checked_int("retry.max_attempts", self.max_attempts, at_least=1, at_most=5)
        waits = (self.initial_backoff_s, self.max_backoff_s)
        if not 1e-3 <= as_float(waits[0]) <= as_float(waits[1]) <= MAX_SECONDS:
            raise InvalidArgumentError.of(
                "retry", f"expected 0.001 <= initial_backoff_s <= max_backoff_s <= {MAX_SECONDS:g}, got {waits}"
            )
        if not 1e-3 <= as_float(self.multiplier) <= 1e3:
            raise InvalidArgumentError.of("retry", f"expected multiplier from 0.001 to 1000, got {self.multiplier!r}")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a client needs to make its channel and its calls. Made by `make_settings`.

    Attributes:
        address: as given; several, with commas between.
        target: gRPC's.
        timeout: seconds for a call that names none; None: no limit.
        token: bearer token.
        credentials: for a secure channel; None: plaintext.
        wait_for_ready: whether calls wait for a server that is not there yet.
        max_message_bytes: largest request and answer.
        max_attempts: of a call, in all.
        model_key: metadata key under which calls carry their model's name; None: none.
        options: gRPC channel options.
    """

    address: str
    target: str
    timeout: float | None
    token: str | None = field(repr=False)
    credentials: grpc.ChannelCredentials | None
    wait_for_ready: bool
    max_message_bytes: int
    max_attempts: int
    model_key: str | None
    options: tuple[tuple[str, str | int], ...]

    def timeout_of(self, timeout: Timeout) -> float | None:
        """Return the seconds for one call, None for no limit.

        Raises:
            InvalidArgumentError: not a number of seconds that gRPC can carry.
        """
        return self.timeout if timeout is UNSET else checked_timeout(timeout)

    def describe(self, name: str) -> str:
        """Return the client's repr; the token is masked."""
        token = "None" if self.token is None else "'********'"
        return f"{name}({self.address!r}, tls={self.credentials is not None}, token={token}, timeout={self.timeout})"

    def call_metadata(self, model: str = "") -> tuple[str, tuple[tuple[str, str], ...]]:
        """Return a new request id and the metadata of one call, which may name a model."""
        request_id = uuid.uuid4().hex
        metadata: tuple[tuple[str, str], ...] = ((REQUEST_ID_KEY, request_id),)
        if self.token is not None:
            # As metadata: gRPC refuses call credentials on plaintext channels, even to this machine.
            metadata += (("authorization", f"Bearer {self.token}"),)
        # gRPC carries no other names; servers have none either.
        if self.model_key is not None and model and model.isascii() and model.isprintable():
            metadata += ((self.model_key, model),)
        return request_id, (*metadata, *_trace_context())


def _trace_context() -> tuple[tuple[str, str], ...]:
    """The trace that the caller is in, as OpenTelemetry passes it on; nothing in a program that does not use it."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.propagate import inject  # noqa: PLC0415 - the caller's, if it has it

    headers: dict[str, str] = {}
    inject(headers)
    return tuple((name.lower(), value) for name, value in headers.items())


def make_settings(
    address: str | Sequence[str],
    *,
    timeout: float | None,
    token: str | None,
    tls: TLS | bool | None,
    retry: Retry,
    wait_for_ready: bool,
    max_message_bytes: int,
    model_key: str | None,
) -> Settings:
    """Check a client's arguments and read its certificate files.

    Raises:
        InvalidArgumentError: an argument is wrong, or a token would travel in plaintext to another machine.
        FileNotFoundError: a certificate file does not exist (another OSError if it cannot be read).
    """
    target = _target(address)
    if not isinstance(retry, Retry):
        raise InvalidArgumentError.of("retry", f"expected a Retry, got {retry!r}; Retry(max_attempts=1) is no retry")
    if not isinstance(tls, TLS | bool | None):
        raise InvalidArgumentError.of("tls", f"expected a TLS, True, False or None, got {tls!r}")
    if not isinstance(wait_for_ready, bool):
        raise InvalidArgumentError.of("wait_for_ready", f"expected True or False, got {wait_for_ready!r}")
    max_message_bytes = checked_int("max_message_bytes", max_message_bytes, at_least=1)
    if token is not None and not (
        isinstance(token, str) and token.isascii() and token.isprintable() and token and " " not in token
    ):
        raise InvalidArgumentError.of("token", "expected printable ASCII without spaces")
    if model_key is not None and not (is_text(model_key) and _KEY.fullmatch(model_key)):
        raise InvalidArgumentError.of("model_key", f"expected a free key of gRPC metadata, got {model_key!r}")
    shown = address if isinstance(address, str) else ",".join(address)
    loopback = is_loopback(target)
    if tls is None:
        tls = token is not None and not loopback
    if tls is False and token is not None and not loopback:
        raise InvalidArgumentError.of(
            "token", f"refusing to send it in plaintext to {shown}: set tls", reason="PLAINTEXT_TOKEN"
        )
    several = not isinstance(address, str)
    options = channel_options(retry, max_message_bytes, balanced=several)
    if loopback:
        # Calls to this machine, with their plaintext token, must not go through a proxy.
        options += (("grpc.enable_http_proxy", 0),)
    if several and tls:
        # The target's own addresses are no names that a certificate has.
        hosts = {one.rpartition(":")[0] for one in address}
        if len(hosts) > 1 and (tls is True or tls.server_name is None):
            raise InvalidArgumentError.of(
                "tls", "several hosts need TLS(server_name=...), the name in their certificates"
            )
        options += (("grpc.default_authority", hosts.pop()),)
    if isinstance(tls, TLS) and tls.server_name is not None:
        options += (("grpc.ssl_target_name_override", tls.server_name),)
    return Settings(
        address=shown,
        target=target,
        timeout=checked_timeout(timeout),
        token=token,
        credentials=_credentials(TLS() if tls is True else tls) if tls else None,
        wait_for_ready=wait_for_ready,
        max_message_bytes=max_message_bytes,
        max_attempts=int(retry.max_attempts),
        model_key=model_key,
        options=options,
    )


def _target(address: str | Sequence[str]) -> str:
    if isinstance(address, list | tuple) and address and all(is_text(one) for one in address):
        try:
            return target_of(address)
        except ValueError as error:
            raise InvalidArgumentError.of("address", str(error)) from None
    if (
        not isinstance(address, str)
        or not is_text(address)
        or not address
        or "\0" in address
        or address.partition("://")[0].lower() in {"http", "https", "grpc", "grpcs"}
    ):
        raise InvalidArgumentError.of(
            "address", f"expected 'host:port', a gRPC target, or a list of 'host:port'; got {address!r}"
        )
    return address


def channel_options(
    retry: Retry, max_message_bytes: int, *, balanced: bool = False
) -> tuple[tuple[str, str | int], ...]:
    """Return the gRPC channel options that every client uses; `balanced`: for several servers."""
    return (
        ("grpc.service_config", service_config(retry, balanced=balanced)),
        # Without this, gRPC silently drops retries of requests over 256 KiB: of most photos.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Pings only while calls are open, and no closer than servers tolerate (heatlens: 20 s).
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A name is asked for again when a connection breaks: not 30 s after it was asked for, which is all of a call.
        ("grpc.dns_min_time_between_resolutions_ms", 2_000),
        ("grpc.primary_user_agent", f"heatlens-python/{__version__}"),
    )


_OUTLIERS = {
    "interval": "5s",
    "baseEjectionTime": "15s",
    "maxEjectionPercent": 50,
    "failurePercentageEjection": {"threshold": 50, "enforcementPercentage": 100, "minimumHosts": 2, "requestVolume": 5},
}
"""When a server is left alone for a while: half of its calls within five seconds failed (gRPC proposal A50)."""


def service_config(retry: Retry, *, balanced: bool = False) -> str:
    """Return the gRPC service config (JSON): round robin over all addresses of the target, and the retry policy.

    `balanced`: servers that are not ready, as they load or drain, get no calls, and servers whose calls fail get none
    for a while. For one server this would turn "model X is loading, try again in 2 s" into a bare "unavailable", and
    would keep `health()` and `models()` from reaching the very server they ask about.
    Health itself is never retried: it says how things are now.
    """
    round_robin: dict[str, object] = {"round_robin": {}}
    config: dict[str, object] = {"loadBalancingConfig": [round_robin]}
    if balanced:
        config["healthCheckConfig"] = {"serviceName": "readiness"}
        # gRPC before 1.49 lacks the first.
        config["loadBalancingConfig"] = [
            {"outlier_detection_experimental": {**_OUTLIERS, "childPolicy": [round_robin]}},
            round_robin,
        ]
    if retry.max_attempts > 1:
        config["methodConfig"] = [
            {
                "name": [
                    {"service": "heatlens.v1.ExplainService", "method": "Explain"},
                    {"service": "heatlens.v1.ModelService", "method": "ListModels"},
                    {"service": "heatlens.v1.ModelService", "method": "GetServerInfo"},
                ],
                "retryPolicy": {
                    "maxAttempts": int(retry.max_attempts),
                    "initialBackoff": f"{float(retry.initial_backoff_s):.9f}s",
                    "maxBackoff": f"{float(retry.max_backoff_s):.9f}s",
                    "backoffMultiplier": float(retry.multiplier),
                    # gRPC's core ends some calls as CANCELLED where more come than a server accepts. One that its
                    # caller cancels is not tried again.
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
                },
            }
        ]
        # Stop retrying when half of the last calls failed: retries must not keep a struggling server down.
        config["retryThrottling"] = {"maxTokens": 20, "tokenRatio": 0.1}
    return json.dumps(config)


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    return credentials(tls.ca_file, tls.cert_file, tls.key_file)
