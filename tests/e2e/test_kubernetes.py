"""deploy/kubernetes: Kubernetes takes each resource, and keys, flags, ports, services and metrics in them are there."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import kubernetes_validate
import pytest
import trustme
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heatlens import TLS, Client, UnauthenticatedError
from heatlens_server.config import load_config
from server_process import until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
BIN = Path(sys.executable).parent
DOCUMENT = (ROOT / "docs" / "deploy.md").read_text()
SETS = {
    "base": (),
    "tls": ("tls",),
    "gpu": ("gpu",),
    "monitoring": ("monitoring",),
    "all": ("tls", "gpu", "monitoring"),
}

VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest that has everything, and the newest whose schemas are at hand."""

SERVICE_MONITOR = "monitoring.coreos.com/v1"
"""Of an operator: Kubernetes has no schemas of it."""

each_set = pytest.mark.parametrize("name", [*SETS, "production"])


@cache
def build(name: str) -> dict[str, dict]:
    """The resources of a folder, or of the base with some components, by kind."""
    if name == "production":
        return _kustomize(FOLDER / name)
    with TemporaryDirectory() as folder:
        base, *components = (os.path.relpath(FOLDER / one, os.path.realpath(folder)) for one in ("base", *SETS[name]))
        kustomization = {"resources": [base], "components": components}
        (Path(folder) / "kustomization.yaml").write_text(json.dumps(kustomization))
        return _kustomize(Path(folder))


def _kustomize(folder: Path) -> dict[str, dict]:
    done = subprocess.run(
        [BIN / "kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = list(yaml.safe_load_all(done.stdout))
    assert len({resource["kind"] for resource in found}) == len(found)
    return {resource["kind"]: resource for resource in found}


def pod_of(name: str) -> dict:
    return build(name)["Deployment"]["spec"]["template"]["spec"]


def container_of(name: str) -> dict:
    (container,) = pod_of(name)["containers"]
    return container


def kserve() -> dict:
    return yaml.safe_load((FOLDER / "kserve" / "inference-service.yaml").read_text())


@each_set
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_each_resource(name, version):
    for resource in build(name).values():
        if resource["apiVersion"] != SERVICE_MONITOR:
            kubernetes_validate.validate(resource, version, strict=True)


def test_validation_finds_what_is_wrong():
    """The test above can fail."""
    wrong = json.loads(json.dumps(build("base")["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"]["port"] = "grpc"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@each_set
def test_names_lead_to_something(name):
    resources, pod, container = build(name), pod_of(name), container_of(name)
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert resources["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert resources["Service"]["spec"]["selector"].items() <= labels
    assert resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for port in resources["Service"]["spec"]["ports"]:
        assert (port["targetPort"], port["port"]) == (port["name"], ports[port["name"]])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} == mounted
    for volume in pod["volumes"]:
        if "configMap" in volume:
            assert volume["configMap"]["name"] == resources["ConfigMap"]["metadata"]["name"]
            assert set(resources["ConfigMap"]["data"]) == {"server.toml"}
        if "secret" in volume:
            assert f"kubectl create secret generic {volume['secret']['secretName']} " in DOCUMENT


def test_secrets_have_the_files_that_servers_read():
    for variable in container_of("tls")["env"]:
        folder, file = os.path.split(variable["value"])
        (mount,) = (one for one in container_of("tls")["volumeMounts"] if one["mountPath"] == folder)
        (secret,) = (one["secret"]["secretName"] for one in pod_of("tls")["volumes"] if one["name"] == mount["name"])
        (command,) = re.findall(rf"kubectl create secret generic {secret} ([^\n]*)", DOCUMENT)
        assert file in command
    assert "--from-file=ca.crt" in DOCUMENT, "probes read it"


def test_the_image_is_made_by_the_container_file():
    recipe = (ROOT / "deploy" / "Containerfile").read_text()
    for container in (container_of("base"), container_of("gpu"), *kserve()["spec"]["predictor"]["containers"]):
        assert f"FROM runtime AS {container['image'].removeprefix('heatlens:')}\n" in recipe
    uid = pod_of("base")["securityContext"]["runAsUser"]
    assert f"USER {uid}\n" in recipe
    assert kserve()["spec"]["predictor"]["containers"][0]["securityContext"]["runAsUser"] == uid
    assert "/var/cache/heatlens" in {mount["mountPath"] for mount in container_of("base")["volumeMounts"]}


@each_set
def test_a_pod_ends_within_its_time_and_fits_into_its_memory(name, tmp_path):
    (tmp_path / "server.toml").write_text(build(name)["ConfigMap"]["data"]["server.toml"])
    server = load_config(tmp_path / "server.toml").server
    sleep_s = container_of(name)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod_of(name)["terminationGracePeriodSeconds"] >= sleep_s + server.grace_s + 5
    memory = container_of(name)["resources"]["limits"]["memory"]
    assert memory == container_of(name)["resources"]["requests"]["memory"]
    assert server.max_bytes_in_flight + server.max_decoding_bytes <= int(memory.removesuffix("Gi")) * 2**30 // 2


def start(name: str, folder: Path, launch):
    """The server as a container of the deployment would start it: files at other places, a free port, the loopback."""
    toml = build(name)["ConfigMap"]["data"]["server.toml"].replace("0.0.0.0:50051", "127.0.0.1:0")
    env = {one["name"]: one["value"] for one in container_of(name).get("env", ())}
    for key, value in env.items():
        env[key] = value.replace("/etc/heatlens-", f"{folder}/").replace("0.0.0.0:9090", "127.0.0.1:0")
    assert container_of(name)["args"] == ["serve", "--config", "/etc/heatlens/server.toml"]
    return launch(toml, env=env)


def test_probes_of_the_base_are_answered(tmp_path, launch):
    server = start("base", tmp_path, launch)
    with grpc.insecure_channel(server.address) as channel:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container_of("base")[probe]["grpc"]["port"] == container_of("base")["ports"][0]["containerPort"]
            request = health_pb2.HealthCheckRequest(service=container_of("base")[probe]["grpc"]["service"])
            check = health_pb2_grpc.HealthStub(channel).Check
            until(lambda: check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING)  # noqa: B023
        # What KServe's clients ask.
        ready = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")(b"", timeout=10)
        assert ready == b"\x08\x01"
    services = [container_of("base")[probe]["grpc"]["service"] for probe in ("startupProbe", "livenessProbe")]
    assert services == ["liveness", "liveness"], "a server that loads is not killed"


def test_production_has_tls_a_token_probes_and_metrics(tmp_path, launch, chelsea):
    authority = trustme.CA()
    (tmp_path / "tls").mkdir()
    (tmp_path / "token").mkdir()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "tls" / "ca.crt")
    certificate.private_key_pem.write_to_path(tmp_path / "tls" / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls" / "tls.crt")
    (tmp_path / "token" / "token").write_text("a-token")
    server = start("production", tmp_path, launch)
    port = server.address.rpartition(":")[2]
    tls = TLS(ca_file=tmp_path / "tls" / "ca.crt")
    with Client(f"localhost:{port}", tls=tls, token="a-token", wait_for_ready=True) as client:
        assert client.explain(chelsea).explanations[0].label
    with Client(f"localhost:{port}", tls=tls) as client, pytest.raises(UnauthenticatedError):
        client.explain(chelsea)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        found = container_of("production")[probe]
        assert "grpc" not in found
        words = [word.replace("/etc/heatlens-", f"{tmp_path}/") for word in found["exec"]["command"]]
        words = [word.replace(":50051", f":{port}") for word in words]
        assert ("--live" in words) == (probe != "readinessProbe")
        done = subprocess.run([BIN / words[0], *words[1:]], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, "serving"), done.stderr
    (metrics_port,) = re.findall(r"metrics on .*?, port (\d+)", server.log())
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30) as response:
        scraped = response.read().decode()
    (metric,) = build("production")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert f"\n{metric['pods']['metric']['name']}{{" in scraped


def test_monitoring_finds_the_servers():
    resources = build("production")
    service, monitor = resources["Service"], resources["ServiceMonitor"]
    assert monitor["apiVersion"] == SERVICE_MONITOR
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    (listen,) = (one["value"] for one in container_of("production")["env"] if one["name"] == "HEATLENS_METRICS__LISTEN")
    assert f":{ports[endpoint['port']]}" in listen
    assert endpoint["path"] == "/metrics"
    # Of the alert rules.
    assert (service["metadata"]["name"], 'job="heatlens"' in (ROOT / "deploy" / "alerts.yml").read_text()) == (
        "heatlens",
        True,
    )
    policy = resources["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == service["spec"]["selector"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == set(ports)


def test_the_autoscaler_alone_says_how_many_servers_there_are():
    target = build("production")["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    deployment = build("production")["Deployment"]
    assert target == {key: deployment[key] for key in ("apiVersion", "kind")} | {"name": deployment["metadata"]["name"]}
    assert "replicas" not in deployment["spec"]
    assert build("base")["Deployment"]["spec"]["replicas"] > 1


def test_kserve_starts_the_same_container():
    assert kserve()["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = kserve()["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"
    (port,) = container["ports"]
    assert container["args"] == ["serve", "--listen", f"0.0.0.0:{port['containerPort']}"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["service"] == container_of("base")[probe]["grpc"]["service"]
        assert container[probe]["grpc"]["port"] == port["containerPort"]
    # What KServe adds nothing to is a pod.
    pod = {key: predictor[key] for key in ("containers", "volumes", "terminationGracePeriodSeconds")}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "spec": pod}, VERSIONS[-1], strict=True)
