"""The options of the commands, each defined once, and their groups in the help."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from multisa.runtime.writers.registry import WRITERS

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)

# Copies of names in runtime/backends and runtime/bundle, which --help must not load. A test compares them.
BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu", "openvino")
PRECISIONS = ("fp32", "fp16", "int8", "bf16")
METHODS = ("segmenter", "walk")

OTHER_OPTIONS = "Options"
_NETWORKS = "Networks"
_RESULTS = "Results"
_FAILURES = "Failures and resumed runs"
_SPEED = "Speed"
_MACHINES = "Processes and machines"
_MONITORING = "Monitoring"
_SOURCE = "Sources behind a URL"


class GroupedOption(click.Option):
    """An option that the help lists under the heading `group`."""

    def __init__(self, *arguments: Any, group: str = OTHER_OPTIONS, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists its options in groups; options without a group come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group, in the order in which the groups first occur."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", OTHER_OPTIONS), []).append(record)
        others = groups.pop(OTHER_OPTIONS, [])
        for title, records in [*groups.items(), (OTHER_OPTIONS, others)]:
            with formatter.section(click.style(title, bold=True)):
                formatter.write_dl(records)


def option(*names: str, group: str = OTHER_OPTIONS, **attributes: Any) -> Callable[[Command], Command]:
    """Return `click.option` with a group."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def _complete(names: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def matches(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        done, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{done}{comma}{name}") for name in names if name.startswith(last)]

    return matches


def _count(name: str, group: str, text: str, least: int = 1) -> Callable[[Command], Command]:
    return option(name, type=click.IntRange(least), metavar="N", group=group, help=text)


def _text(name: str, metavar: str, group: str, text: str) -> Callable[[Command], Command]:
    return option(name, metavar=metavar, group=group, help=text)


def _flag(name: str, text: str) -> Callable[[Command], Command]:
    return option(name, is_flag=True, group=_FAILURES, help=text)


def _choice(name: str, metavar: str, names: tuple[str, ...], text: str) -> Callable[[Command], Command]:
    complete = _complete(("auto", *names))
    attributes = {"default": "auto", "show_default": True, "metavar": metavar, "help": text}
    return option(name, group=_NETWORKS, shell_complete=complete, **attributes)


def output_option(**attributes: Any) -> Callable[[Command], Command]:
    """Add --output, required unless `attributes` says otherwise."""
    defaults = {"required": True, "help": "Folder for the results.", **attributes}
    return option("-o", "--output", type=PATH, metavar="OUT", **defaults)


def max_pixels_option(what: str) -> Callable[[Command], Command]:
    """Add --max-pixels, the size limit of each `what`."""
    return _count("--max-pixels", OTHER_OPTIONS, f"Largest {what}; 50 million by default.")


bundle_option = option(
    "--bundle", type=PATH, metavar="DIR", group=_NETWORKS, help="Bundle to run; the packaged one by default."
)
engine_cache_option = option(
    "--engine-cache",
    type=FOLDER,
    metavar="DIR",
    group=_NETWORKS,
    help="Also look for TensorRT engines here, besides BUNDLE/engines.",
)
method_option = option(
    "--method",
    type=click.Choice(METHODS),
    metavar="NAME",
    group=_NETWORKS,
    help="segmenter: the trained segmenter, restricted to the labels; walk: class activation maps and random walk; "
    "the bundle's by default.",
)
json_option = option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

_BACKEND_OPTIONS = (
    _choice(
        "--backend",
        "NAME",
        BACKENDS,
        f"What runs the graphs: {', '.join(BACKENDS)}; auto takes the first that is usable.",
    ),
    _choice(
        "--precision", "P", PRECISIONS, "fp32, fp16 or int8, if the bundle has it; bf16 for the segmenter on openvino."
    ),
    engine_cache_option,
)

_RUN_OPTIONS = (
    click.argument("images", nargs=-1, required=True),
    output_option(group=_RESULTS),
    option(
        "--writer",
        "writers",
        multiple=True,
        metavar="NAME",
        shell_complete=_complete(tuple(WRITERS)),
        group=_RESULTS,
        help=f"Formats to write, repeated or separated by commas: {', '.join(WRITERS)}; masks by default.",
    ),
    _count(
        "--report-images",
        _RESULTS,
        "Images on OUT/report.html, the most uncertain first; 200 by default, 0 for no page.",
        least=0,
    ),
    _text("--image-prefix", "TEXT", _RESULTS, "Prefix of image paths in Label Studio tasks."),
    bundle_option,
    *_BACKEND_OPTIONS,
    option(
        "--min-area",
        type=click.FloatRange(0, 1, max_open=True),
        metavar="SHARE",
        group=_RESULTS,
        help="Parts of a mask with a smaller share of the image take the class around them; the bundle's by default.",
    ),
    _text(
        "--max-failures",
        "N|P%",
        _FAILURES,
        "Stop with exit code 4 as soon as more images fail. By default a run continues to its end and exits "
        "with 4 if any image failed.",
    ),
    _flag("--retry-failed", "Try the failed images of OUT again."),
    _flag("--overwrite", "Remove the run in OUT and start from scratch."),
    _flag("--skip-source-check", "Resume without checking whether IMAGES has changed."),
    _flag("--verify", "Hash the committed files again and redo any that changed."),
    _count("--max-pixels", _FAILURES, "Larger images are failures; 50 million by default."),
    _count("--workers", _SPEED, "Threads; one for each usable CPU by default."),
    _count("--readers", _SPEED, "Threads that read; as many as --workers by default, 16 for images behind a URL."),
    _count("--batch", _SPEED, "Images of one size per call of a backend; 1 by default."),
    _count("--shard-size", _SPEED, "Images that are committed together; 256 by default."),
    _count("--num-processes", _MACHINES, "Processes side by side; with several GPUs each takes the next one."),
    _text(
        "--ray",
        "ADDRESS",
        _MACHINES,
        "Process the shards on a Ray cluster (auto, local, HOST:PORT); OUT must be shared.",
    ),
    _text("--log-json", "FILE", _MONITORING, "Write events as JSON lines; - for stderr."),
    option(
        "--metrics-port",
        type=click.IntRange(1, 65535),
        metavar="PORT",
        group=_MONITORING,
        help="Serve Prometheus metrics on this port.",
    ),
    _text("--metrics-host", "HOST", _MONITORING, "Address to serve metrics on; 127.0.0.1 by default."),
    _text("--storage-options", "JSON", _SOURCE, """Options for fsspec, such as '{"endpoint_url": "..."}'."""),
)


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help."""
    return lambda command: reduce(lambda done, decorate: decorate(done), reversed(options), command)


def backend_options(command: Command) -> Command:
    """Add --backend, --precision and --engine-cache."""
    return together(*_BACKEND_OPTIONS)(command)


def run_options(command: Command) -> Command:
    """Add the arguments that `label` and `segment` share; `multisa.runtime.api.RunSettings` takes them."""
    return together(*_RUN_OPTIONS)(command)
