"""What follows from a server's address and its certificates. Imports little: probes of health pay for it each time."""

import ipaddress
import socket
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import grpc


def credentials(
    ca_file: str | PathLike[str] | None, cert_file: str | PathLike[str] | None, key_file: str | PathLike[str] | None
) -> grpc.ChannelCredentials:
    """Read PEM files: the authorities to trust (None: those that come with gRPC), a certificate and its key.

    Raises:
        OSError: a file cannot be read.
    """
    ca, chain, key = (None if name is None else Path(name).read_bytes() for name in (ca_file, cert_file, key_file))
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=chain)


def target_of(addresses: Sequence[str]) -> str:
    """Return one gRPC target for several servers, "ipv4:1.2.3.4:50051,...": their names are resolved now.

    Raises:
        ValueError: one is not "host:port", has no address, or they have none of one kind (IPv4 or IPv6).
    """
    found: dict[socket.AddressFamily, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or "/" in host:
            raise ValueError(f"expected 'host:port', got {address!r}")
        try:
            resolved = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            raise ValueError(f"{host} cannot be resolved: {error}") from error
        for family, ends in found.items():
            # Of a name that has several addresses, all.
            ends += [_endpoint(end[0], end[1]) for kind, *_, end in resolved if kind is family]
            if not any(kind is family for kind, *_ in resolved):
                ends.append("")
    for scheme, ends in zip(("ipv4", "ipv6"), found.values(), strict=True):
        if "" not in ends:
            return f"{scheme}:{','.join(dict.fromkeys(ends))}"
    raise ValueError("some have only IPv4 addresses and some only IPv6")


def _endpoint(host: object, port: object) -> str:
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    """Whether every endpoint of a gRPC target is on this machine: loopback addresses, localhost, Unix sockets."""
    scheme, separator, rest = address.partition(":")
    if separator and scheme in {"unix", "unix-abstract"}:
        return True
    if separator and scheme in {"ipv4", "ipv6"}:
        return all(_is_loopback_host(endpoint) for endpoint in rest.split(","))
    if separator and scheme == "dns":
        # dns:host:port, dns:///host:port or dns://resolver/host:port.
        rest = rest.rpartition("/")[2]
        return _is_loopback_host(rest)
    return _is_loopback_host(address)


def _is_loopback_host(endpoint: str) -> bool:
    if endpoint.startswith("["):
        host = endpoint[1:].partition("]")[0]
    elif endpoint.count(":") > 1:
        host = endpoint
    else:
        host = endpoint.partition(":")[0]
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
