"""Models that administrators load, unload and reload over the wire: who may, what is said, and that no call fails."""

import asyncio
import time

import pytest
import trustme
from typer.testing import CliRunner

import heatlens
from heatlens import AsyncClient, Client, FailedPreconditionError, NotFoundError, PermissionDeniedError
from heatlens._cli.commands import app
from server_process import wait_settled
from server_toml import model_toml, server_toml

A, B = model_toml("a", "tiny"), model_toml("b", "tiny_mlp")
ADMIN = '[admin]\nenabled = true\ntoken = "admin"\n'
CHANGES = ("load_model", "reload_model", "unload_model")


@pytest.fixture
def edited(launch, tmp_path):
    """Start a server, and write what it reads from then on: `edited(before, after)`."""

    def start(before: str, after: str):
        running = launch(before)
        wait_settled(running.address, token="user" if "user" in before else None)
        (tmp_path / "server.toml").write_text(after)
        return running

    return start


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("toml", "token", "said"),
    [
        (server_toml(A), None, "admin.enabled is not set"),
        (server_toml(ADMIN, A, token="user"), "user", "only administrators change models"),
        (server_toml(ADMIN, A), None, "only administrators change models"),
    ],
)
def test_everybody_else_is_refused(launch, toml, token, said, change):
    running = launch(toml)
    with Client(running.address, token=token) as client:
        with pytest.raises(PermissionDeniedError, match=said) as raised:
            getattr(client, change)("a")
        assert raised.value.reason == "ADMIN_REQUIRED"
        assert [model.name for model in client.models()] == ["a"]


def test_models_are_loaded_reloaded_and_unloaded_as_the_configuration_says_by_then(edited, chelsea):
    versioned = A.replace("[[models]]", '[[models]]\nversion = "2"')
    running = edited(server_toml(ADMIN, A, token="user"), server_toml(ADMIN, versioned, B, token="user"))
    with Client(running.address, token="admin") as admin, Client(running.address, token="user") as user:
        admin.load_model("b")
        assert user.explain(chelsea, model="b").explanations
        admin.reload_model("a")
        assert user.explain(chelsea, model="a").model_version == "2"
        admin.unload_model("b")
        with pytest.raises(NotFoundError):
            user.explain(chelsea, model="b")
        with pytest.raises(NotFoundError, match="'b'"):
            admin.unload_model("b")
        with pytest.raises(NotFoundError, match="'c'"):
            admin.load_model("c")
        with pytest.raises(FailedPreconditionError, match="there is a model 'a:2' already") as raised:
            admin.load_model("a")
        assert raised.value.reason == "MODEL_CHANGE_REFUSED"


def test_what_cannot_be_loaded_says_so_and_leaves_what_serves(edited, tmp_path, chelsea):
    broken = A.replace("tiny_models:tiny", "tiny_models:broken")
    running = edited(server_toml(ADMIN, A), server_toml(ADMIN, broken, B))
    with Client(running.address, token="admin") as admin:
        with pytest.raises(FailedPreconditionError) as raised:
            admin.reload_model("a")
        assert raised.value.reason == "MODEL_FAILED"
        assert "/secret/path" not in raised.value.message
        assert admin.explain(chelsea, model="a").explanations
        (tmp_path / "server.toml").write_text("[server")
        with pytest.raises(FailedPreconditionError, match="the log says how") as raised:
            admin.load_model("b")
        assert raised.value.reason == "CONFIG_INVALID"


async def test_no_call_fails_while_a_model_is_reloaded(launch, chelsea):
    running = launch(server_toml(ADMIN, A))
    await asyncio.to_thread(wait_settled, running.address)
    over = asyncio.Event()
    answered = 0
    once = heatlens.Retry(max_attempts=1)
    async with AsyncClient(running.address, token="admin") as admin, AsyncClient(running.address, retry=once) as caller:

        async def ask() -> None:
            nonlocal answered
            while not over.is_set():
                assert (await caller.explain(chelsea)).explanations
                answered += 1

        asking = [asyncio.create_task(ask()) for _ in range(3)]
        for _ in range(3):
            await admin.reload_model("a", timeout=60)
        over.set()
        await asyncio.gather(*asking)
    assert answered > 0


def test_the_command_line(edited):
    running = edited(server_toml(ADMIN, A), server_toml(ADMIN, A, B))
    for change in ("load", "reload", "unload"):
        done = CliRunner().invoke(
            app, ["models", change, "b", "--server", running.address], env={"HEATLENS_TOKEN": "admin"}
        )
        assert (done.exit_code, done.output) == (0, f"b is {change}ed\n")
    refused = CliRunner().invoke(app, ["models", "load", "b", "--server", running.address])
    assert refused.exit_code == 1
    assert "ADMIN_REQUIRED" in refused.output


def test_a_certificate_of_an_administrators_name_needs_no_token(tmp_path, launch):
    authority = trustme.CA()
    for name in ("localhost", "ops", "other"):
        issued = authority.issue_cert(name)
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = '[server.tls]\ncertificate = "localhost.pem"\nprivate_key = "localhost.key"\nclient_ca = "ca.pem"'
    running = launch(server_toml(tls, '[admin]\nenabled = true\nclient_names = ["ops"]', A))
    address = running.address.replace("127.0.0.1", "localhost")

    def client(name: str) -> Client:
        files = {"cert_file": tmp_path / f"{name}.pem", "key_file": tmp_path / f"{name}.key"}
        return Client(address, tls=heatlens.TLS(ca_file=tmp_path / "ca.pem", **files))

    with client("ops") as admin, client("other") as other:
        deadline = time.monotonic() + 60
        while admin.health("a") != "serving":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(PermissionDeniedError):
            other.unload_model("a")
        admin.unload_model("a")
        assert other.models() == ()
