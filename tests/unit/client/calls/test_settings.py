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
    "model_key": None,
}


def settings(address="localhost:50051", **changes):
    return make_settings(address, **{**DEFAULTS, **changes})


LOOPBACK = [
    "localhost:50051", "LOCALHOST:1", "127.0.0.1:50051", "127.8.9.10", "[::1]:50051", "::1",
    "dns:localhost:50051", "dns:///localhost:50051", "ipv4:127.0.0.1:1,127.0.0.2:2", "ipv6:[::1]:5",
    "unix:/run/heatlens.sock", "unix:///run/heatlens.sock", "unix-abstract:heatlens",
]  # fmt: skip


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback(address):
    assert is_loopback(address)
    assert settings(address, token="t").credentials is None


ELSEWHERE = [
    "example.com:50051", "10.0.0.1:50051", "0.0.0.0:50051", "[2001:db8::1]:50051",
    "localhost.example.com:1", "127.0.0.1.example.com:1", "dns:///example.com:1",
    "dns://127.0.0.1/example.com:1", "ipv4:127.0.0.1:1,10.0.0.1:2", "xds:///localhost",
]  # fmt: skip


@pytest.mark.parametrize("address", ELSEWHERE)
def test_not_loopback(address):
    assert not is_loopback(address)
    assert settings(address).credentials is None
    assert isinstance(settings(address, token="t").credentials, grpc.ChannelCredentials)
    with pytest.raises(InvalidArgumentError, match="refusing to send it in plaintext") as caught:
        settings(address, token="t", tls=False)
    assert caught.value.reason == "PLAINTEXT_TOKEN"


def test_several_servers_are_one_target_by_their_addresses():
    made = settings(["127.0.0.1:1", "127.0.0.2:2", "127.0.0.1:1"], token="t")
    assert (made.target, made.credentials) == ("ipv4:127.0.0.1:1,127.0.0.2:2", None)
    assert made.address == "127.0.0.1:1,127.0.0.2:2,127.0.0.1:1"
    assert settings(["[::1]:1", "[::1]:2"]).target == "ipv6:[::1]:1,[::1]:2"
    assert settings(["10.0.0.1:1", "10.0.0.1:2"], token="t").credentials is not None


def test_several_hosts_need_one_name_for_their_certificates():
    with pytest.raises(InvalidArgumentError, match="server_name") as caught:
        settings(["127.0.0.1:1", "127.0.0.2:1"], tls=True)
    assert caught.value.field_violations[0].field == "tls"
    assert settings(["127.0.0.1:1", "127.0.0.2:1"], tls=TLS(server_name="models.example")).credentials is not None
    assert ("grpc.default_authority", "127.0.0.1") in settings(["127.0.0.1:1", "127.0.0.1:2"], tls=True).options


def test_servers_that_are_not_ready_are_left_alone_where_there_are_several():
    assert "healthCheckConfig" not in json.loads(service_config(Retry()))
    config = json.loads(service_config(Retry(), balanced=True))
    assert config["healthCheckConfig"] == {"serviceName": "readiness"}
    (outliers, plain) = config["loadBalancingConfig"]
    assert outliers["outlier_detection_experimental"]["childPolicy"] == [plain] == [{"round_robin": {}}]


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


WRONG = {
    "address": [
        *("", "http://localhost:50051", 5, b"localhost:1", "\ud800", "local\0host:1"),
        *([], [""], ["localhost"], ["localhost:x"], ["dns:///localhost:1"], [5], ["no-such-host.invalid:1"]),
        ["127.0.0.1:1", "[::1]:1"],
    ],
    "timeout": [0, -1.0, 1e10, float("nan"), float("inf")],
    "token": ["", "two words", "line\nbreak", "ümlaut", 5],
    "max_message_bytes": [0, 2**31, 1.5],
    "retry": [None, 3],
    "tls": [5],
    "wait_for_ready": ["no"],
}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_arguments_are_named(argument, value):
    with pytest.raises(InvalidArgumentError) as caught:
        settings(**{argument: value})
    assert caught.value.field_violations[0].field == argument
    if argument == "token" and value and isinstance(value, str):
        assert value not in str(caught.value)


WRONG_RETRIES = {
    "max_attempts": [0, 6, 2.5, "2", True],
    "initial_backoff_s": [0, 0.0009, "1", float("nan")],
    "max_backoff_s": [0.01, float("inf"), 1e15],
    "multiplier": [0, 1e300, float("nan"), None],
}


@pytest.mark.parametrize(("field", "value"), [(name, one) for name, values in WRONG_RETRIES.items() for one in values])
def test_wrong_retry(field, value):
    with pytest.raises(InvalidArgumentError, match="retry"):
        Retry(**{field: value})


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
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"]
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


def test_the_name_of_a_model_goes_under_the_key_that_a_proxy_reads():
    assert dict(settings(model_key="application").call_metadata("parts")[1])["application"] == "parts"
    assert "application" not in dict(settings(model_key="application").call_metadata()[1])
    assert "application" not in dict(settings(model_key="application").call_metadata("für\n")[1])
    assert len(settings().call_metadata("parts")[1]) == 1


@pytest.mark.parametrize(
    "key", ["", "Model", "a b", "grpc-timeout", "model-bin", "authorization", "traceparent", 1, "é"]
)
def test_a_key_that_is_not_free(key):
    with pytest.raises(InvalidArgumentError, match="model_key: expected a free key of gRPC metadata"):
        settings(model_key=key)
