"""The engines against a plain forward pass of the same model, and against the grad-cam package."""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.table import Table

from bench.candidate import FORWARD, GRAD_CAM, ONNXRUNTIME, TORCH, TORCHSCRIPT, TUNED
from bench.measure import FairQueue, take_turns
from bench.models import efficientnet_lite0, resnet50
from heatlens_server.backends.torch.export.folder import export_bundle
from heatlens_server.backends.torch.export.network import export_network
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.methods import Method

MODELS: tuple[Callable[[], LoadedModel], ...] = (efficientnet_lite0, resnet50)
BATCH_SIZES = (1, 8)
KINDS = (FORWARD, TUNED, GRAD_CAM, TORCH, TORCHSCRIPT, ONNXRUNTIME)


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A ratio that must hold: at most `most`, or at least `least`, at these batch sizes."""

    name: str
    of: str
    to: str
    most: float | None = None
    least: float | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES

    @property
    def bound(self) -> str:
        """As in the table's head; empty if there is none."""
        return f"<= {self.most}" if self.most is not None else f">= {self.least}" if self.least is not None else ""

    def met(self, ratio: float) -> bool:
        """Whether a measured ratio is good enough."""
        return (self.most is None or ratio <= self.most) and (self.least is None or ratio >= self.least)


RATIOS = (
    Target("onnxruntime / forward", ONNXRUNTIME, FORWARD, most=0.65),
    Target("onnxruntime / forward tuned", ONNXRUNTIME, TUNED),
    Target("grad-cam / onnxruntime", GRAD_CAM, ONNXRUNTIME, least=5.0),
    Target("torch / forward tuned", TORCH, TUNED, most=1.10, batch_sizes=(8,)),
    Target("grad-cam / torch", GRAD_CAM, TORCH, least=2.5, batch_sizes=(8,)),
    Target("torchscript / forward tuned", TORCHSCRIPT, TUNED),
)


def run(*, turns: int) -> list[Table]:
    """Measure and tabulate times and ratios."""
    times = Table(title="median ms per batch, each candidate in its own process, taking turns")
    ratios = Table(title="ratios, turn by turn, medians; explain = uint8 in, Grad-CAM map and logits out")
    for table, columns in ((times, KINDS), (ratios, [f"{ratio.name} {ratio.bound}".strip() for ratio in RATIOS])):
        for column in ("model", "batch", *columns):
            table.add_column(column, justify="right")
    for make in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            _export(make, Path(folder))
            for batch_size in BATCH_SIZES:
                measured = _measure(
                    make.__name__, batch_size, Path(folder), turns=turns if batch_size > 1 else 3 * turns
                )
                times.add_row(make.__name__, str(batch_size), *(f"{measured.median_ms(kind):.1f}" for kind in KINDS))
                ratios.add_row(
                    make.__name__, str(batch_size), *(_cell(ratio, measured, batch_size) for ratio in RATIOS)
                )
    times.caption = (
        "forward = the module in inference_mode on float input as PyTorch runs it by default; tuned = channels_last "
        "and the server's allocator settings; grad-cam = the package, by default too. torch, torchscript and "
        "onnxruntime are this project's engines."
    )
    return [times, ratios]


def _cell(target: Target, measured: FairQueue, batch_size: int) -> str:
    ratio = measured.ratio(target.of, target.to)
    if not target.bound or batch_size not in target.batch_sizes:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} {'met' if target.met(ratio) else 'MISSED'}"


def _export(make: Callable[[], LoadedModel], folder: Path) -> None:
    """Write what the engines that run exports need: the default layer and method."""
    for kind, write in ((ONNXRUNTIME, export_network), (TORCHSCRIPT, export_bundle)):
        model = make()
        model = dataclasses.replace(model, layers=model.layers[:1])
        of_kind = folder / kind
        of_kind.mkdir()
        manifest = write(
            model,
            methods=(Method.GRAD_CAM,),
            precision="fp32",
            source="bench",
            folder=of_kind,
            report=lambda _line: None,
        )
        manifest.write(of_kind)


def _measure(model: str, batch_size: int, folder: Path, *, turns: int) -> FairQueue:
    with ExitStack() as stack:
        runs = {kind: stack.enter_context(_candidate(kind, model, batch_size, folder)) for kind in KINDS}
        return take_turns(runs, turns=turns)


@contextmanager
def _candidate(kind: str, model: str, batch_size: int, folder: Path) -> Iterator[Callable[[], float]]:
    """Start a candidate's process; yield what makes it run once and returns its seconds."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.candidate", kind, model, str(batch_size), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answers = process.stdin, process.stdout
        if asked is None or answers is None or answers.readline() != "ready\n":
            raise RuntimeError(f"{kind} did not start")

        def once() -> float:
            asked.write("\n")
            asked.flush()
            return float(answers.readline())

        yield once
        asked.close()
