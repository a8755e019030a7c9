"""Where tokens may go, what the channel is told, and what is refused."""

import json

import grpc
import pytest

from heatlens import TLS, AsyncClient, Client, InvalidArgumentError, Retry, UnavailableError
from heatlens._calls.settings import channel_options, is_loopback, make_settings, service_config

DEFAULTS = {
    "timeout": 30.0,
    "token": None,
    "tls": None,
    "retry": Retry(),
    "wait_for_ready": False,
    "max_message_bytes": 1 << 24,
}


def settings(address="localhost:50051", **changes):
    return make_settings(address, **{**DEFAULTS, **changes})


@pytest.mark.parametrize(
    "address",
    [
        "localhost:50051",
        "LOCALHOST:1",
        "127.0.0.1:50051",
        "127.8.9.10",
        "[::1]:50051",
        "::1",
        "dns:localhost:50051",
        "dns:///localhost:50051",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
        "ipv6:[::1]:5",
        "unix:/run/heatlens.sock",
        "unix:///run/heatlens.sock",
        "unix-abstract:heatlens",
    ],
)
def test_loopback(address):
    assert is_loopback(address)
    assert settings(address, token="t").credentials is None


@pytest.mark.parametrize(
    "address",
    [
        "example.com:50051",
        "10.0.0.1:50051",
        "0.0.0.0:50051",
        "[2001:db8::1]:50051",
        "localhost.example.com:1",
        "127.0.0.1.example.com:1",
        "dns:///example.com:1",
        "dns://127.0.0.1/example.com:1",
        "ipv4:127.0.0.1:1,10.0.0.1:2",
        "xds:///localhost",
    ],
)
def test_not_loopback(address):
    assert not is_loopback(address)
    assert settings(address).credentials is None
    assert isinstance(settings(address, token="t").credentials, grpc.ChannelCredentials)
    with pytest.raises(InvalidArgumentError, match="refusing to send it in plaintext") as caught:
        settings(address, token="t", tls=False)
    assert caught.value.reason == "PLAINTEXT_TOKEN"


def test_tls_on_request():
    assert settings(tls=True).credentials is not None
    assert settings(tls=TLS()).credentials is not None
    assert settings(tls=False).credentials is None


def test_proxy_is_off_for_loopback_only():
    assert ("grpc.enable_http_proxy", 0) in settings().options
    assert ("grpc.enable_http_proxy", 0) not in settings("example.com:1").options


def test_server_name_and_files(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_bytes(b"pem")
    made = settings(tls=TLS(ca_file=ca, server_name="models.example"))
    assert ("grpc.ssl_target_name_override", "models.example") in made.options
    with pytest.raises(FileNotFoundError):
        settings(tls=TLS(ca_file=tmp_path / "missing.pem"))
    with pytest.raises(InvalidArgumentError, match="cert_file and key_file"):
        TLS(cert_file=ca)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"address": ""}, "address"),
        ({"address": "http://localhost:50051"}, "address"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1.0}, "timeout"),
        ({"token": ""}, "token"),
        ({"token": "two words"}, "token"),
        ({"token": "line\nbreak"}, "token"),
        ({"token": "ümlaut"}, "token"),
        ({"token": 5}, "token"),
        ({"max_message_bytes": 0}, "max_message_bytes"),
        ({"max_message_bytes": 2**31}, "max_message_bytes"),
        ({"max_message_bytes": 1.5}, "max_message_bytes"),
        ({"address": 5}, "address"),
        ({"address": b"localhost:1"}, "address"),
        ({"address": "\ud800"}, "address"),
        ({"address": "local\0host:1"}, "address"),
        ({"timeout": 1e10}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"retry": None}, "retry"),
        ({"retry": 3}, "retry"),
        ({"tls": 5}, "tls"),
        ({"wait_for_ready": "no"}, "wait_for_ready"),
    ],
)
def test_wrong_arguments_are_named(changes, argument):
    with pytest.raises(InvalidArgumentError) as caught:
        settings(**changes)
    assert caught.value.field_violations[0].field == argument
    if isinstance(changes.get("token"), str) and changes["token"]:
        assert changes["token"] not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0},
        {"max_attempts": 6},
        {"max_attempts": 2.5},
        {"max_attempts": "2"},
        {"max_attempts": True},
        {"initial_backoff_s": 0},
        {"initial_backoff_s": 0.0009},
        {"initial_backoff_s": "1"},
        {"initial_backoff_s": float("nan")},
        {"max_backoff_s": 0.01},
        {"max_backoff_s": float("inf")},
        {"max_backoff_s": 1e15},
        {"multiplier": 0},
        {"multiplier": 1e300},
        {"multiplier": float("nan")},
        {"multiplier": None},
    ],
)
def test_wrong_retry(options):
    with pytest.raises(InvalidArgumentError, match="retry"):
        Retry(**options)


@pytest.mark.parametrize("options", [{"ca_file": 5}, {"ca_file": "\0"}, {"server_name": 5}, {"server_name": "\ud800"}])
def test_wrong_tls(options):
    with pytest.raises(InvalidArgumentError, match="tls"):
        TLS(**options)


def test_extremes_that_grpc_takes():
    retry = Retry(max_attempts=5, initial_backoff_s=1e-3, max_backoff_s=1e9, multiplier=1e3)
    # An unusable service config would be INVALID_ARGUMENT, a deadline that wraps around DEADLINE_EXCEEDED.
    with (
        Client("127.0.0.1:1", retry=retry, timeout=1e9, max_message_bytes=2**31 - 1) as client,
        pytest.raises(UnavailableError),
    ):
        client.health()


def test_retry_buffer_holds_the_largest_message():
    options = dict(channel_options(Retry(), 1234))
    assert options["grpc.per_rpc_retry_buffer_size"] == 1234
    assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == 1234


def test_service_config():
    config = json.loads(service_config(Retry(max_attempts=3, initial_backoff_s=0.001)))
    (method,) = config["methodConfig"]
    assert method["retryPolicy"]["maxAttempts"] == 3
    assert method["retryPolicy"]["initialBackoff"] == "0.001000000s"
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    assert {"service": "heatlens.v1.ExplainService", "method": "Explain"} in method["name"]
    assert "methodConfig" not in json.loads(service_config(Retry(max_attempts=1)))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_repr_masks_the_token(kind):
    client = kind("localhost:1", token="s3cret")
    assert "s3cret" not in repr(client)
    assert "s3cret" not in repr(client._settings)
    assert repr(client) == f"{kind.__name__}('localhost:1', tls=False, token='********', timeout=30.0)"
    if kind is Client:
        client.close()


def test_every_call_has_its_own_request_id():
    made = settings(token="t")
    first, metadata = made.call_metadata()
    second, _ = made.call_metadata()
    assert first != second
    assert dict(metadata) == {"x-request-id": first, "authorization": "Bearer t"}
