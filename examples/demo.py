"""Start a server, ask it why a photo of a cat is a cat, and write the answer as pictures: `make demo`.

`--since SECONDS` says when installing began, in seconds since the epoch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from heatlens import Client, Health, Result, UnavailableError

# CC0, by Stéfan van der Walt.
PHOTO = Path(__file__).parents[1] / "server/heatlens_server/backends/torch/export/photos/chelsea.jpg"
OUT = Path("out/demo")
START_TIMEOUT_S = 120.0
POLL_S = 0.1


def main() -> None:
    """Explain the photo and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", type=float, default=time.time())
    since = parser.parse_args().since
    installed = time.time()
    photo = cv2.imread(str(PHOTO), cv2.IMREAD_COLOR_RGB)  # uint8 (288, 433, 3)
    with running_server() as address, Client(address) as client:
        serving = time.time()
        result = client.explain(photo, top_k=3)
        explained = time.time()
    console = Console()
    console.print(classes_table(result))
    install_s, start_s, explain_s = installed - since, serving - installed, explained - serving
    steps = f"{install_s:.1f} to install, {start_s:.1f} to start the server, {explain_s:.1f} to explain"
    console.print(f"{explained - since:.1f} s: {steps}", highlight=False, soft_wrap=True)
    for path in write_pictures(photo, result):
        console.print(f"wrote {path}", soft_wrap=True)


@contextmanager
def running_server() -> Iterator[str]:
    """Run `heatlens-server serve` without a configuration on a free port; yield its address once it is serving."""
    # The demo shows the defaults, whatever HEATLENS_* says.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEATLENS_")}
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [sys.executable, "-m", "heatlens_server", "serve", "--listen", "127.0.0.1:0"]
        server = subprocess.Popen([*command, "--port-file", str(port_file)], env=environment)
        try:
            yield wait_serving(server, port_file)
        finally:
            server.terminate()
            exit_code = server.wait(60)
        if exit_code != 0:
            raise SystemExit(f"the server ended with exit code {exit_code}")


def wait_serving(server: "subprocess.Popen[bytes]", port_file: Path) -> str:
    """Wait until the server says that it is serving, and return its address."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        port = port_file.read_text() if port_file.exists() else ""
        if port.endswith("\n") and is_serving(address := f"127.0.0.1:{port.strip()}"):
            return address
        time.sleep(POLL_S)
    raise SystemExit("the server did not start; its log is above")


def is_serving(address: str) -> bool:
    """Ask the server once."""
    with Client(address) as client:
        try:
            return client.health(timeout=5.0) is Health.SERVING
        except UnavailableError:
            return False


def classes_table(result: Result) -> Table:
    """Tabulate the explained classes."""
    table = Table(title=f"{result.model} {result.model_version}")
    for name in ("class", "label", "probability"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for item in result.explanations:
        table.add_row(str(item.class_id), item.label, f"{item.probability:.1%}")
    return table


def write_pictures(photo: np.ndarray, result: Result) -> list[Path]:
    """Write the top class's overlay, and photo and overlay side by side; return the paths."""
    top = result.explanations[0]
    overlay, pair = OUT / f"chelsea-{top.label.lower().replace(' ', '-')}.png", OUT / "chelsea.jpg"
    OUT.mkdir(parents=True, exist_ok=True)
    top.heatmap.save(overlay, photo)
    side_by_side = np.hstack([photo, top.heatmap.overlay(photo)])
    cv2.imwrite(str(pair), cv2.cvtColor(side_by_side, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return [overlay, pair]


if __name__ == "__main__":
    main()
