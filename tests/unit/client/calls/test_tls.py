"""Encrypted channels, with a certificate authority of our own."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import trustme
import typer
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from heatlens import TLS, AsyncClient, Client, Health, Retry, UnavailableError
from heatlens._cli.commands import app

ONCE = Retry(max_attempts=1)


class Tokens(health.HealthServicer):
    """Records the authorization header of every call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def Check(self, request, context):
        self.seen.append(dict(context.invocation_metadata()).get("authorization"))
        return super().Check(request, context)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def ca_file(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture(params=[False, True], ids=["tls", "mtls"])
def tls_peer(request, authority):
    certificate = authority.issue_cert("models.example", "127.0.0.1")
    servicer = Tokens()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    credentials = grpc.ssl_server_credentials(
        [(certificate.private_key_pem.bytes(), b"".join(blob.bytes() for blob in certificate.cert_chain_pems))],
        root_certificates=authority.cert_pem.bytes() if request.param else None,
        require_client_auth=request.param,
    )
    servicer.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    servicer.mutual = request.param
    server.start()
    yield servicer
    server.stop(0).wait()


@pytest.fixture
def tls(tls_peer, authority, ca_file, tmp_path):
    if not tls_peer.mutual:
        return TLS(ca_file=ca_file)
    certificate = authority.issue_cert("client.example")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    return TLS(ca_file=ca_file, cert_file=tmp_path / "cert.pem", key_file=str(tmp_path / "key.pem"))


def test_token_over_tls(tls_peer, tls):
    with Client(tls_peer.address, tls=tls, token="s3cret", retry=ONCE) as client:
        assert client.health() is Health.SERVING
    assert tls_peer.seen == ["Bearer s3cret"]


async def test_async_over_tls(tls_peer, tls):
    async with AsyncClient(tls_peer.address, tls=tls, retry=ONCE) as client:
        assert await client.health() is Health.SERVING


def test_unknown_authority_is_not_trusted(tls_peer):
    with Client(tls_peer.address, tls=True, token="s3cret", retry=ONCE) as client, pytest.raises(UnavailableError):
        client.health()
    assert tls_peer.seen == []


def test_server_name_is_checked(tls_peer, tls):
    right = TLS(ca_file=tls.ca_file, cert_file=tls.cert_file, key_file=tls.key_file, server_name="models.example")
    wrong = TLS(ca_file=tls.ca_file, cert_file=tls.cert_file, key_file=tls.key_file, server_name="other.example")
    with Client(tls_peer.address, tls=right) as client:
        assert client.health() is Health.SERVING
    with Client(tls_peer.address, tls=wrong) as client, pytest.raises(UnavailableError):
        client.health()


def test_the_command_line_shows_its_certificate(tls_peer, tls):
    files = ["--ca", tls.ca_file]
    if tls_peer.mutual:
        done = CliRunner().invoke(app, ["health", "--server", tls_peer.address, *map(str, files)])
        assert done.exit_code == 2, "the server wants a certificate"
        files += ["--cert", tls.cert_file, "--key", tls.key_file]
    done = CliRunner().invoke(app, ["health", "--server", tls_peer.address, *map(str, files)])
    assert (done.exit_code, done.stdout) == (0, "serving\n"), done.output


@pytest.mark.parametrize("option", ["--cert", "--key"])
def test_a_certificate_without_its_key_is_a_wrong_option(ca_file, option):
    done = CliRunner().invoke(app, ["models", "--server", "127.0.0.1:1", option, str(ca_file)])
    assert done.exit_code == 2
    assert "give --cert and --key, or neither" in done.stderr


def test_every_command_takes_certificates():
    # `top` reads metrics, which is no call.
    for command in typer.main.get_command(app).commands.keys() - {"top"}:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        assert all(option in shown for option in ("--server", "--tls", "--ca", "--cert", "--key")), command
