"""One photo and every method that the embedded model supports, side by side: `make gallery`."""

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from demo import running_server
from matplotlib import pyplot as plt
from rich.console import Console
from skimage import data

from heatlens import Client, Heatmap

mpl.use("Agg")

OUT = Path("out/gallery/methods.jpg")
COLUMNS = 6
PANEL_INCHES = (2.6, 1.95)
DPI = 110

FINER = ("is-cam", "ss-cam")
"""Methods that run the network 10 and 35 times per channel: at the layer before, which has far fewer."""


def main() -> None:
    """Explain the photo with every method and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=OUT, help="where the figure goes (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console()
    photo = data.chelsea()  # uint8 (300, 451, 3), RGB, CC0
    with running_server() as address, Client(address, timeout=None) as client:
        (model,) = client.models()
        # All of them explain one class: the model's first choice.
        top = client.explain(photo, model=model.name).explanations[0]
        heatmaps: dict[str, Heatmap] = {}
        for method in model.methods:
            started_at = time.monotonic()
            layer = model.layers[1] if method in FINER else model.layers[0]
            # Refine-CAM is about all layers.
            layers = None if method == "refine-cam" else layer
            result = client.explain(photo, model=model.name, method=method, class_ids=top.class_id, layers=layers)
            name = f"{method} ({layer})" if method in FINER else method
            heatmaps[name] = result.explanations[0].heatmap
            console.print(f"{name:28} {time.monotonic() - started_at:7.1f} s", highlight=False)
    draw(photo, heatmaps, title=f"{model.name}: why “{top.label}” ({top.probability:.0%})", path=arguments.output)
    console.print(f"wrote {arguments.output}", soft_wrap=True)


def draw(photo: np.ndarray, heatmaps: dict[str, Heatmap], *, title: str, path: Path) -> None:
    """Write the photo and each method's overlay, named, in rows."""
    panels = {"photo": photo, **{method: heatmap.overlay(photo) for method, heatmap in heatmaps.items()}}
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1]), dpi=DPI, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, picture) in zip(axes.flat, panels.items(), strict=False):
        axis.imshow(picture)
        axis.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
