"""The `heatlens-server` command: serve, check and export. Machine output on stdout, messages on stderr."""

import asyncio
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from heatlens_server.allocator import keep_freed_memory
from heatlens_server.core.causes import with_causes
from heatlens_server.core.errors import ConfigError, ExportError, ModelLoadError
from heatlens_server.native_threads import wait_briefly
from heatlens_server.telemetry.logs import configure_logging
from heatlens_server.telemetry.native_lines import take_native_lines
from heatlens_server.telemetry.output import end_output, queue_output

if TYPE_CHECKING:
    from heatlens_server.config import Config

app = typer.Typer(
    name="heatlens-server",
    help="Serve image models with explanations over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="TOML file. Without one, the embedded ImageNet model is served.", dir_okay=False
    ),
]


@app.command()
def serve(
    config: ConfigOption = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address to listen on; port 0 picks one.")
    ] = None,
    port_file: Annotated[
        Path | None, typer.Option(help="Write the bound port to this file once it is listening.")
    ] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the calls in flight."""
    # Before numpy and torch are imported and start threads: a thread keeps the heap that it started with.
    keep_freed_memory()
    wait_briefly()
    # Until the event loop takes over there is nothing to drain.
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    # Its default would end the server when the terminal is closed.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if port_file is not None and not port_file.parent.is_dir():
        _fail(f"--port-file: there is no folder {port_file.parent}")
    overrides: dict[str, Any] = {"server": {"listen": listen}} if listen else {}
    settings = _load(config, overrides)
    queue_output()
    configure_logging(log_format=settings.server.log_format, level=settings.server.log_level)
    if settings.server.log_format == "json":
        take_native_lines()
    faulthandler.enable()
    # Only now: importing torch takes seconds, and a wrong configuration should be told at once.
    from heatlens_server.app import Server  # noqa: PLC0415
    from heatlens_server.app import serve as serve_until_signal  # noqa: PLC0415
    from heatlens_server.config import load_config  # noqa: PLC0415
    from heatlens_server.ending import ModelHangs  # noqa: PLC0415

    def read() -> "Config":
        return load_config(config, overrides)

    def announce(server: Server) -> None:
        if port_file is not None:
            port_file.write_text(f"{server.port}\n")

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            try:
                ended, exit_code = runner.run(serve_until_signal(settings, on_start=announce, read=read)), 0
            except ModelHangs:
                ended, exit_code = False, 1
            if not ended:
                # A thread is inside native code (loading, or a batch that outlived the grace). Finalising the
                # interpreter under it would abort the process.
                end_output()
                os._exit(exit_code)
    except ConfigError as error:
        _fail(error)


@app.command()
def check(
    config: ConfigOption = None,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Explain this photo and its mirror image, too; write each model's map over it to NAME-check.png.",
        ),
    ] = None,
) -> None:
    """Print the effective configuration, load the models, explain one image with each, and exit."""
    settings = _load(config, {})
    configure_logging(log_format=settings.server.log_format, level="warning")
    sys.stdout.write(settings.model_dump_json(indent=2) + "\n")
    from heatlens_server.check import check_model  # noqa: PLC0415

    passed = [
        check_model(
            model, write=lambda line: typer.echo(line, err=True), cache_dir=settings.server.cache_path, photo=image
        )
        for model in settings.models
    ]
    if not all(passed):
        raise typer.Exit(1)


@app.command()
def warm(config: ConfigOption = None) -> None:
    """Export the models that are not in the cache yet, and exit: servers that share it start in seconds."""
    settings = _load(config, {})
    configure_logging(log_format=settings.server.log_format, level="warning")
    from heatlens_server.check import warm_model  # noqa: PLC0415

    cache = settings.server.cache_path
    passed = [warm_model(one, lambda line: typer.echo(line, err=True), cache_dir=cache) for one in settings.models]
    if not all(passed):
        raise typer.Exit(1)


@app.command()
def ray(
    *,
    config: ConfigOption = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|auto", show_default="start one here", help="The Ray cluster to serve on."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of gRPC, on every node of the cluster.")] = 50051,
    name: Annotated[str, typer.Option(help="Of the application; what has it is replaced.")] = "heatlens",
    replicas: Annotated[int, typer.Option(metavar="N", min=1, help="How many; with --max-replicas, at least.")] = 1,
    max_replicas: Annotated[
        int, typer.Option(metavar="N", min=0, show_default="--replicas", help="At most, by load.")
    ] = 0,
    target_queue_length: Annotated[
        float, typer.Option(metavar="N", min=0, help="Images that should wait in each: go by these, not by calls.")
    ] = 0.0,
    num_cpus: Annotated[float, typer.Option(metavar="C", min=0.01, help="Cores of each replica.")] = 1.0,
    num_gpus: Annotated[float, typer.Option(metavar="G", min=0.0, help="GPUs of each replica.")] = 0.0,
) -> None:
    """Serve on a Ray cluster until SIGTERM or Ctrl-C: replicas on its nodes, behind Ray's gRPC proxies."""
    if 0 < max_replicas < replicas:
        _fail("--max-replicas: is less than --replicas")
    if target_queue_length and not max_replicas:
        _fail("--target-queue-length: needs --max-replicas")
    settings = _load(config, {})
    try:
        from heatlens_server import ray_serve  # noqa: PLC0415 - an extra
    except ImportError as error:
        _fail(f"this needs {error.name}, which is not installed: pip install 'heatlens[ray]'")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    scale = ray_serve.Scale(
        replicas=replicas,
        max_replicas=max_replicas,
        target_queue_length=target_queue_length,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    try:
        ray_serve.start(settings, scale, address=address, port=port, name=name)
    except (RuntimeError, ConnectionError) as error:
        _fail(error, exit_code=1)
    typer.echo(f"{name} answers on port {port} of every node", err=True)
    stop.wait()
    ray_serve.stop(name)


@app.command()
def export(
    *,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's name in the configuration, or a source: torchvision:NAME.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder to write; an earlier export in it is replaced."),
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Triton model repository to write to instead, with the model's config.pbtxt."),
    ] = None,
    config: ConfigOption = None,
    weights: Annotated[
        str, typer.Option(metavar="WEIGHTS", help='Of a source: "default", "none", a name or a file.')
    ] = "",
    file_format: Annotated[str, typer.Option("--format", metavar="onnx|torchscript|pt2", help="File format.")] = "onnx",
    layer: Annotated[str, typer.Option(metavar="NAME", help="Target layer's module name. Unset: the model's.")] = "",
    method: Annotated[
        str, typer.Option(metavar="METHOD", help="Method of the map, such as hi-res-cam. Unset: the model's.")
    ] = "",
    target_score: Annotated[
        str,
        typer.Option(
            metavar="logit|probability|log-probability|contrast", help="What is differentiated. Unset: the logit."
        ),
    ] = "",
    classes: Annotated[str, typer.Option(metavar="K|any", help="Classes explained per image.")] = "1",
    precision: Annotated[str, typer.Option(metavar="fp32|fp16", help="What the network runs in.")] = "fp32",
    outputs: Annotated[str, typer.Option(metavar="NAME,...|all", help="logits, class_id, cam and so on.")] = "all",
    input_kind: Annotated[
        str, typer.Option("--input", metavar="float|uint8", help="Normalised values, or RGB pixels.")
    ] = "float",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the result and compare it with the network in float64.")
    ] = True,
) -> None:
    """Write a model as one static graph with logits, activations, gradients and map."""
    # As Ctrl-C does: nothing is left behind.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    configure_logging(log_format="console", level="warning")
    from heatlens_server import export_command  # noqa: PLC0415 - imports numpy, see `serve`

    try:
        options = export_command.parse_options(
            file_format=file_format,
            layer=layer,
            method=method,
            target_score=target_score,
            classes=classes,
            precision=precision,
            outputs=outputs,
            input_kind=input_kind,
            verify=verify,
            folder=output,
            triton=triton,
        )
        found = export_command.find_model(model, config, weights)
        stderr = sys.stderr
        manifest = export_command.run_export(found, options, tell=lambda line: typer.echo(line, file=stderr))
    except ConfigError as error:
        _fail(error)
    except (ExportError, ModelLoadError) as error:
        _fail(with_causes(error), exit_code=1)
    for line in export_command.describe(manifest, options.folder_of(found.name), triton=triton is not None):
        typer.echo(line)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop where there is one: about a fifth less CPU time per call than asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


def _version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(version("heatlens"))
        raise typer.Exit


@app.callback()
def _main(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=lambda wanted: _version(wanted=wanted), is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Serve image models with explanations over gRPC."""


def _load(path: Path | None, overrides: dict[str, Any]) -> "Config":
    from heatlens_server.config import load_config  # noqa: PLC0415 - imports numpy, see `serve`

    try:
        settings = load_config(path, overrides)
        # Said now rather than once torch is imported.
        settings.server.read_token()
    except ConfigError as error:
        _fail(error)
    return settings


def _fail(error: object, *, exit_code: int = 2) -> NoReturn:
    typer.echo(f"heatlens-server: {error}", err=True)
    raise typer.Exit(exit_code)
