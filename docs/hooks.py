"""What `mkdocs build` generates: the command line and API pages, and pages for files outside docs/.

docs/cli.md and docs/api.md hold markers such as `<!-- cli -->` and `<!-- api: multisa.export -->`. They are
replaced by tables of the click commands, and by one mkdocstrings directive for each public name.
"""

import html
import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# mkdocstrings reads copies of the sources here, as a package. In the repository the package is the root
# folder itself, and walking through that would also read .venv and build.
SOURCE = ROOT / "build" / "docs-source"
PACKAGES = ("kernels", "runtime", "training", "export")
OTHER_OPTIONS = "Options"  # of no group
# Files of the root folder that become pages of the site, and folders whose JSON files it gets.
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "benchmarks/results/": "results/"}


def on_config(config: MkDocsConfig) -> None:
    """Copy the sources for mkdocstrings."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for package in PACKAGES:
        target = SOURCE / "multisa" / package
        shutil.copytree(ROOT / package, target, ignore=lambda folder, names: [n for n in names if _skip(folder, n)])
    for path in ROOT.glob("__init__.py"):
        shutil.copy(path, SOURCE / "multisa")


def _skip(folder: str, name: str) -> bool:
    return Path(folder, name).is_file() and not name.endswith(".py")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and files that lie outside docs/."""
    for outside, target in OUTSIDE.items():
        path = ROOT / outside
        for source in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            name = target + source.name if path.is_dir() else target
            files.append(File.generated(config, name, content=source.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Expand the markers, and let links lead to where files of the root folder are in the site."""
    for outside, target in {**OUTSIDE, "docs/": "", "README.md": "index.md"}.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(outside)}", f"]({target}", markdown)
    markdown = re.sub(r"<!-- api: (\S+) -->", lambda found: api_of(found[1]), markdown)
    return markdown.replace("<!-- cli -->", command_line()) if "<!-- cli -->" in markdown else markdown


def api_of(package: str) -> str:
    """One mkdocstrings directive for each name in `__all__` of a package."""
    names = [name for name in importlib.import_module(package).__all__ if not name.startswith("__")]
    return "\n\n".join(f"::: {_path_of(package, name)}" for name in names)


def _path_of(package: str, name: str) -> str:
    """A function is hidden by a module of its own name, so it is found through that."""
    is_module = (SOURCE / package.replace(".", "/") / f"{name}.py").is_file()
    return f"{package}.{name}.{name}" if is_module else f"{package}.{name}"


def command_line() -> str:
    """Every command of `multisa`: what it does, examples, arguments and options."""
    from multisa.runtime.cli.main import COMMANDS, root

    parent = click.Context(root, info_name="multisa", **root.context_settings)
    parts = [_describe("multisa", root, parent, help_text=False)]
    for name in COMMANDS:
        command = root.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent)
        parts.append(_describe(f"multisa {name}", command, context))
        for below, sub in getattr(command, "commands", {}).items():
            parts.append(_describe(f"multisa {name} {below}", sub, click.Context(sub, info_name=below, parent=context)))
    return "\n\n".join(parts)


def _describe(title: str, command: click.Command, context: click.Context, *, help_text: bool = True) -> str:
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    groups: dict[str, list[str]] = {}
    for param in command.get_params(context):
        name, text = param.get_help_record(context) or ("", "")
        if text:  # arguments have none: the help of the command explains them
            group = groups.setdefault(getattr(param, "group", OTHER_OPTIONS), [])
            group.append(f"| <code>{_cell(name)}</code> | {_cell(text)} |")
    others = groups.pop(OTHER_OPTIONS, [])
    tables = [
        "\n".join([f"| {group} | |", "|---|---|", *rows]) for group, rows in [*groups.items(), (OTHER_OPTIONS, others)]
    ]
    paragraphs = _help_as_markdown(inspect.cleandoc(command.help or "")) if help_text else ""
    return "\n\n".join([f"## {title}", f"```text\n{usage}\n```", paragraphs, *tables])


def _cell(text: str) -> str:
    """One cell of a table, on one line, without its separator."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def _help_as_markdown(text: str) -> str:
    r"""Paragraphs of a command's help; those that click keeps as they are (`\b`) become code blocks."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text):
        first, *lines = paragraph.splitlines()
        if first.strip() != "\b":
            parts.append(paragraph)
        elif lines[0].endswith(":"):
            parts.append("\n".join([lines[0], "", "```bash", *(line[2:] for line in lines[1:]), "```"]))
        else:
            parts.append("\n".join(["```text", *lines, "```"]))
    return "\n\n".join(parts)


class ReadableDocstrings(griffe.Extension):
    """Shows `name: description` lines, and fields with their comments, as lists, and examples as code."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Make a list item of every sentence that describes a parameter."""
        names = "|".join(re.escape(parameter.name.lstrip("*")) for parameter in func.parameters)
        if func.docstring and names:
            item = rf"(?:^|(?<=\. ))((?:{names})(?:, (?:{names}))*): "
            func.docstring.value = re.sub(item, r"\n\n- **\1**: ", func.docstring.value, flags=re.MULTILINE)
        _examples_as_code(func)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """List the fields that have a comment at the end of their line."""
        if not isinstance(cls.filepath, Path):
            return
        lines = cls.filepath.read_text(encoding="utf-8").splitlines()
        fields = []
        for attribute in cls.attributes.values():
            if attribute.is_alias or attribute.docstring or attribute.name.startswith("_"):
                continue
            _, mark, comment = lines[(attribute.endlineno or attribute.lineno or 1) - 1].partition("  # ")
            if mark:
                fields.append(f"- **{attribute.name}**: {comment}")
        if fields and cls.docstring:
            cls.docstring.value += "\n\n" + "\n".join(fields)
        _examples_as_code(cls)


def _examples_as_code(item: griffe.Object) -> None:
    """Fence the lines that begin with the prompt of Python, without the prompt."""
    if item.docstring:
        parts = re.split(r"((?:^(?:>>>|\.\.\.).*\n?)+)", item.docstring.value, flags=re.MULTILINE)
        for index in range(1, len(parts), 2):
            code = "\n".join(line[4:] for line in parts[index].splitlines())
            parts[index] = f"```python\n{code}\n```\n"
        item.docstring.value = "".join(parts)
