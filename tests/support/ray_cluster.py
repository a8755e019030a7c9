"""A Ray cluster of two local nodes that serves a configuration, as a program: told what to do on standard input.

    python ray_cluster.py FILE PORT
    kill        kill the process of one replica
    remove      take the second node away
    serve JSON  serve what FILE has by now, with these fields of Scale
    deploy YAML have Ray's `serve deploy` deploy a file
    count       print how many replicas run
    <end>       end the cluster

It answers each line with "done" once it is so.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from heatlens_server import ray_serve
from heatlens_server.config import load_config

MIB = 2**20

# Replicas tell Ray of their load every 10 seconds, which Ray does not let applications change any more.
ray_serve.AutoscalingConfig = functools.partial(ray_serve.AutoscalingConfig, metrics_interval_s=0.5)


def replica_pids() -> list[int]:
    found = list_actors(filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in found if actor.class_name.startswith("ServeReplica:")]


def main(path: Path, port: int) -> None:
    node = {"num_cpus": 1, "object_store_memory": 80 * MIB}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": True, "dashboard_port": 0})
    second = cluster.add_node(**node)

    def serve(**scale: float) -> None:
        ray_serve.start(
            load_config(path),
            ray_serve.Scale(**{"replicas": 2, "num_cpus": 0.5, **scale}),
            address=cluster.address,
            port=port,
            name="heatlens",
        )

    serve()
    print("done", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["kill"]:
                os.kill(replica_pids()[0], signal.SIGKILL)
            case ["remove"]:
                cluster.remove_node(second)
            case ["serve", *scale]:
                serve(**json.loads("".join(scale)))
            case ["deploy", file]:
                command = [Path(sys.executable).parent / "serve", "deploy", file]
                subprocess.run([*command, "-a", f"http://{cluster.head_node.webui_url}"], stdout=sys.stderr, check=True)
            case ["count"]:
                print(len(replica_pids()))
        print("done", flush=True)
    ray_serve.stop("heatlens")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
