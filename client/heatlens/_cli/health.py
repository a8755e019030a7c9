"""`heatlens health`: whether the server, or one model, serves. Made for probes: the exit code is the answer.

Imports gRPC alone, and what failures need only when there is one. Health needs no token.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import grpc

from heatlens._wire.target import credentials, is_loopback

_CHECK = "/grpc.health.v1.Health/Check"
_MODEL_PREFIX = "heatlens.v1.ExplainService/"

# By HealthCheckResponse.status, the message's only field, a varint of one byte: what is printed, and the exit code.
_STATES = {b"\x08\x01": ("serving", 0), b"\x08\x02": ("not-serving", 1)}


def run(arguments: Sequence[str]) -> int:
    """Ask, print, and return the exit code."""
    options = parser()
    given = options.parse_args(arguments)
    if (given.cert is None) != (given.key is None):
        options.error("give --cert and --key, or neither")
    if given.live and given.model is not None:
        options.error("give --live or --model")
    service = "liveness" if given.live else "" if given.model is None else _MODEL_PREFIX + given.model
    channel_options = [("grpc.enable_http_proxy", 0)] if is_loopback(given.server) else []
    try:
        if given.tls or given.ca is not None or given.cert is not None:
            secrets = credentials(given.ca, given.cert, given.key)
            channel = grpc.secure_channel(given.server, secrets, channel_options)
        else:
            channel = grpc.insecure_channel(given.server, channel_options)
        with channel:
            # Without serializers: bytes to bytes.
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_CHECK)
            answer = check(_request(service), timeout=given.timeout)
    except (grpc.RpcError, OSError) as error:
        sys.stderr.write(f"heatlens: error: {_describe(error, given.model)}\n")
        return 2
    word, code = _STATES.get(answer, ("unknown", 2))
    sys.stdout.write(f"{word}\n")
    return code


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="heatlens health",
        allow_abbrev=False,
        description='Print "serving" or "not-serving". '
        "Exits with 0 if serving, 1 if not, 2 if unreachable or unknown. Asks whether the server is ready.",
    )
    add = made.add_argument
    address = os.environ.get("HEATLENS_ADDRESS", "localhost:50051")
    add("-s", "--server", default=address, metavar="HOST:PORT", help="The server. [env: HEATLENS_ADDRESS]")
    add("--model", metavar="TEXT", help="Ask about this model, instead of the whole server.")
    add("--live", action="store_true", help="Ask whether the process answers at all, also while it loads or drains.")
    add("--timeout", type=float, default=5.0, metavar="SECONDS", help="Time for the call. [default: 5.0]")
    add("--tls", action="store_true", help="Encrypt. Implied by --ca and --cert.")
    add("--ca", metavar="FILE", help="PEM file with the certificate authorities to trust.")
    add("--cert", metavar="FILE", help="PEM file with this client's certificate; with --key.")
    add("--key", metavar="FILE", help="PEM file with the certificate's private key.")
    return made


def _request(service: str) -> bytes:
    """HealthCheckRequest: its only field is number 1, text. Importing protobuf would take longer than the call."""
    text = service.encode()
    length, size = bytearray(), len(text)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"\x0a" + bytes(length) + text if text else b""


def _describe(error: grpc.RpcError | OSError, model: str | None) -> str:
    from heatlens._cli.connection import describe  # noqa: PLC0415 - only where something failed
    from heatlens._exceptions import NotFoundError  # noqa: PLC0415
    from heatlens._wire.status import error_of, unknown_model  # noqa: PLC0415

    if isinstance(error, OSError):
        return describe(error)
    told = error_of(error, "")
    return describe(unknown_model(told, model) if isinstance(told, NotFoundError) else told)
