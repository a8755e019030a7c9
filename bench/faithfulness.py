"""How faithful each method is on real photos: `python -m bench.faithfulness` prints a table for docs/methods.md."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.models import photo_paths
from bench.served import serve
from heatlens import Client, Evaluation, evaluate

OUT = Path("out/faithfulness")


def main(
    methods: Annotated[str, typer.Option(help="Names with commas, or all.")] = "all",
    out: Annotated[Path, typer.Option(help="Where the chart and the figures go.")] = OUT,
) -> None:
    """Evaluate methods on the embedded model and six photos."""
    console = Console()
    with serve() as service, Client(service.address, timeout=None) as client:
        found = evaluate(
            client,
            photo_paths(),
            methods=methods if methods == "all" else methods.split(","),
            on_progress=lambda done, total: console.print(f"{done} of {total}"),
        )
    out.mkdir(parents=True, exist_ok=True)
    found.chart(out / "methods.png")
    text = markdown(found)
    (out / "methods.md").write_text(text + "\n")
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def markdown(found: Evaluation) -> str:
    """Means and standard errors, a row per method."""
    lines = [f"| method | {' | '.join(found.metrics)} |", "|---" * (len(found.metrics) + 1) + "|"]
    for row in found.rows:
        cells = [f"{row.means[name]:.3f} ± {row.standard_errors[name]:.3f}" for name in found.metrics]
        lines.append(f"| `{row.method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
