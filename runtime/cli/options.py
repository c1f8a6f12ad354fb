"""The options of the commands, each defined once, and how they are grouped in the help."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from multisa.runtime.writers.registry import WRITERS

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)

# The names of runtime/backends/registry.py and base.py, which help does not load; a test compares them.
BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu", "openvino")
PRECISIONS = ("fp32", "fp16", "int8", "bf16")

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
    """A command whose help lists its options in groups, those without one last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group, in the order in which the groups come first."""
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
    """`click.option` with a group."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def _complete(
    names: tuple[str, ...],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def matches(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        done, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{done}{comma}{name}") for name in names if name.startswith(last)]

    return matches


def bundle_option(command: Command) -> Command:
    """Which bundle is run."""
    return option(
        "--bundle",
        type=PATH,
        metavar="DIR",
        group=_NETWORKS,
        help="Bundle to run; the one in the package by default.",
    )(command)


def output_option(**attributes: Any) -> Callable[[Command], Command]:
    """Where results go."""
    given = {"required": True, "help": "Folder for the results.", **attributes}
    return option("-o", "--output", type=PATH, metavar="OUT", **given)


def max_pixels_option(what: str) -> Callable[[Command], Command]:
    """How large `what` may be."""
    return option(
        "--max-pixels", type=click.IntRange(1), metavar="N", help=f"Largest {what}; 50 million by default."
    )


def engine_cache_option(command: Command) -> Command:
    """Where TensorRT engines lie besides those of the bundle."""
    return option(
        "--engine-cache",
        type=FOLDER,
        metavar="DIR",
        group=_NETWORKS,
        help="Look for TensorRT engines here, too, besides BUNDLE/engines.",
    )(command)


def json_option(command: Command) -> Command:
    """Print JSON for programs instead of text for people."""
    return option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def backend_options(command: Command) -> Command:
    """Which backend runs the graphs, and in which precision."""
    for decorate in (
        engine_cache_option,
        option(
            "--precision",
            default="auto",
            show_default=True,
            metavar="P",
            shell_complete=_complete(("auto", *PRECISIONS)),
            group=_NETWORKS,
            help="fp32, fp16 or int8, as the bundle has them; bf16 for segment on openvino.",
        ),
        option(
            "--backend",
            default="auto",
            show_default=True,
            metavar="NAME",
            shell_complete=_complete(("auto", *BACKENDS)),
            group=_NETWORKS,
            help=f"What runs the graphs: {', '.join(BACKENDS)}; auto takes the first that is usable.",
        ),
    ):
        command = decorate(command)
    return command


_RUN_OPTIONS = (
    click.argument("images"),
    output_option(group=_RESULTS),
    option(
        "--writer",
        "writers",
        multiple=True,
        metavar="NAME",
        shell_complete=_complete(tuple(WRITERS)),
        group=_RESULTS,
        help=f"What to write, repeated or separated by commas: {', '.join(WRITERS)}; masks by default.",
    ),
    option(
        "--report-images",
        type=click.IntRange(0),
        metavar="N",
        group=_RESULTS,
        help="Images on OUT/report.html, the most uncertain first; 200 by default, 0 for no page.",
    ),
    option(
        "--image-prefix",
        metavar="TEXT",
        group=_RESULTS,
        help="What Label Studio puts before the path of an image.",
    ),
    bundle_option,
    backend_options,
    option(
        "--max-failures",
        metavar="N|P%",
        group=_FAILURES,
        help="Stop, with exit code 4, when more images fail. By default a run continues to its end and exits "
        "with 4 if any image failed.",
    ),
    option("--retry-failed", is_flag=True, group=_FAILURES, help="Try the failed images of OUT again."),
    option(
        "--overwrite", is_flag=True, group=_FAILURES, help="Remove the run in OUT and start from scratch."
    ),
    option(
        "--skip-source-check",
        is_flag=True,
        group=_FAILURES,
        help="Resume without checking whether IMAGES has changed.",
    ),
    option(
        "--verify",
        is_flag=True,
        group=_FAILURES,
        help="Hash the committed files again and redo any that changed.",
    ),
    option(
        "--max-pixels",
        type=click.IntRange(1),
        metavar="N",
        group=_FAILURES,
        help="Larger images are failures; 50 million by default.",
    ),
    option(
        "--workers",
        type=click.IntRange(1),
        metavar="N",
        group=_SPEED,
        help="Threads; one for each usable CPU by default.",
    ),
    option(
        "--readers",
        type=click.IntRange(1),
        metavar="N",
        group=_SPEED,
        help="Threads that read; as many as --workers by default, 16 where images are behind a URL.",
    ),
    option(
        "--batch",
        type=click.IntRange(1),
        metavar="N",
        group=_SPEED,
        help="Images of one size that a backend gets at once; 1 by default.",
    ),
    option(
        "--shard-size",
        type=click.IntRange(1),
        metavar="N",
        group=_SPEED,
        help="Images that are committed together; 256 by default.",
    ),
    option(
        "--num-processes",
        type=click.IntRange(1),
        metavar="N",
        group=_MACHINES,
        help="Processes side by side; with several GPUs each takes the next one.",
    ),
    option(
        "--ray",
        metavar="ADDRESS",
        group=_MACHINES,
        help="Process the shards on a Ray cluster (auto, local, HOST:PORT); OUT must be shared.",
    ),
    option("--log-json", metavar="FILE", group=_MONITORING, help="Write events as JSON lines; - for stderr."),
    option(
        "--metrics-port",
        type=click.IntRange(1, 65535),
        metavar="PORT",
        group=_MONITORING,
        help="Serve Prometheus metrics on this port.",
    ),
    option(
        "--metrics-host",
        metavar="HOST",
        group=_MONITORING,
        help="Address to serve metrics on; 127.0.0.1 by default.",
    ),
    option(
        "--storage-options",
        metavar="JSON",
        group=_SOURCE,
        help='As fsspec takes them: \'{"endpoint_url": "..."}\'.',
    ),
)


def run_options(command: Command) -> Command:
    """The arguments that `label` and `segment` share; `multisa.runtime.api.RunSettings` takes them."""
    for decorate in reversed(_RUN_OPTIONS):
        command = decorate(command)
    return command
