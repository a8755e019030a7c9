"""What a user of tritonclient writes, run by an environment that holds tritonclient alone: prints JSON.

Arguments: a server's address, and an image file, or the token of an administrator.
"""

import json
import queue
import sys
from collections.abc import Callable

import numpy as np
import tritonclient.grpc as triton

PATIENCE_S = 60
NAMES = ("MAP", "CLASS_ID", "SCORE")


def told(result: triton.InferResult) -> dict:
    """An answer's tensors and names."""
    response = result.get_response()
    found = {name: result.as_numpy(name).tolist() for name in NAMES}
    labels = np.vectorize(bytes.decode)(result.as_numpy("LABEL")).tolist()
    return {**found, "LABEL": labels, "id": response.id, "model": response.model_name}


def error(call: Callable[[], object]) -> list:
    try:
        call()
    except triton.InferenceServerException as raised:
        return [raised.status(), raised.message()]
    return ["", ""]


def files(*data: bytes) -> list:
    tensor = triton.InferInput("IMAGE", [len(data)], "BYTES")
    tensor.set_data_from_numpy(np.array(data, dtype=np.object_))
    return [tensor]


def administer(address: str, token: str) -> dict:
    """Load, reload and unload the models `a`, which serves, and `b`, which does not, as an administrator."""
    headers = {"authorization": f"Bearer {token}"}
    said: dict = {}
    with triton.InferenceServerClient(address) as client:

        def index() -> list:
            return client.get_model_repository_index(as_json=True)["models"]

        said["before"] = index()
        client.load_model("b", headers=headers)
        client.load_model("a", headers=headers)
        said["loaded"] = index()
        client.unload_model("b", headers=headers)
        said["unloaded"] = index()
        said["errors"] = {
            "no administrator": error(lambda: client.unload_model("a")),
            "wrong token": error(lambda: client.load_model("a", headers={"authorization": "Bearer nope"})),
            "model": error(lambda: client.load_model("nope", headers=headers)),
            "not loaded": error(lambda: client.unload_model("b", headers=headers)),
            "configuration": error(lambda: client.load_model("a", headers=headers, config="{}")),
        }
        said["after"] = index()
    return said


def call(address: str, path: str) -> dict:
    """Call everything that tritonclient has for a server without shared memory, and that changes nothing."""
    found: queue.Queue = queue.Queue()

    def keep(result: object, error: object) -> None:
        found.put([error and [error.status(), error.message()], result and told(result)])

    with open(path, "rb") as opened:  # noqa: PTH123 - as its users do
        file = opened.read()
    said: dict = {}
    with triton.InferenceServerClient(address) as client:
        said["live"], said["ready"] = client.is_server_live(), client.is_server_ready()
        said["models ready"] = [client.is_model_ready(name) for name in ("tiny", "broken")]
        said["server"] = client.get_server_metadata(as_json=True)
        said["model"] = client.get_model_metadata("tiny", as_json=True)
        said["config"] = client.get_model_config("tiny", as_json=True)["config"]
        said["index"] = client.get_model_repository_index(as_json=True)["models"]
        asked = {"top_k": 2, "method": "layer-cam", "layer": "body", "map_size": "input"}
        said["file"] = told(client.infer("tiny", files(file), parameters=asked, request_id="one", client_timeout=60))
        pixels = np.arange(2 * 64 * 48 * 3, dtype=np.uint8).reshape(2, 64, 48, 3)
        image = triton.InferInput("IMAGE", pixels.shape, "UINT8")
        image.set_data_from_numpy(pixels)
        target = triton.InferInput("TARGET_CLASS", [2], "INT64")
        target.set_data_from_numpy(np.array([3, 7]))
        said["batch"] = told(client.infer("tiny", [image, target]))
        outputs = [triton.InferRequestedOutput("SCORE")]
        only = client.infer("tiny", files(file), outputs=outputs)
        said["outputs"] = [tensor.name for tensor in only.get_response().outputs]
        client.async_infer("tiny", files(file), keep)
        said["async"] = found.get(timeout=PATIENCE_S)
        client.start_stream(keep)
        for i, data in enumerate((file, b"garbage", file)):
            client.async_stream_infer("tiny", files(data), request_id=str(i))
        said["stream"] = [found.get(timeout=PATIENCE_S) for _ in range(3)]
        client.stop_stream()
        said["statistics"] = client.get_inference_statistics("tiny", as_json=True)["model_stats"]
        shared = triton.InferInput("IMAGE", [1], "BYTES")
        shared.set_shared_memory("region", 10)
        said["errors"] = {
            "model": error(lambda: client.infer("nope", files(file))),
            "version": error(lambda: client.infer("tiny", files(file), model_version="nope")),
            "image": error(lambda: client.infer("tiny", files(b"garbage"))),
            "parameter": error(lambda: client.infer("tiny", files(file), parameters={"top_k": 99})),
            "sequence": error(lambda: client.infer("tiny", files(file), sequence_id=1)),
            "shared memory": error(lambda: client.infer("tiny", [shared])),
            "timeout": error(lambda: client.infer("tiny", files(file), timeout=1)),
            "load": error(lambda: client.load_model("tiny")),
            "log settings": error(client.get_log_settings),
        }
    return said


def main(address: str, path: str = "", *, admin: str = "") -> None:
    """Print what was said."""
    json.dump(administer(address, admin) if admin else call(address, path), sys.stdout)


main(*sys.argv[1:3], admin="".join(sys.argv[3:]))
