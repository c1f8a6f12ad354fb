"""The shape of the code: folders without circles, imports without effects, small files and functions."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "runtime", "training", "export", "benchmarks")
MOST_LINES = 40_000  # of Python outside tests
MOST_BENCHMARK_LINES = 5_100
MOST_RUNTIME_FILES = 89
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 6
COMPILED = "_native"  # the module of the compiled kernels
REASON = "more than six parameters"  # begins the comment that says why a function has them


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [ROOT / "__init__.py", *found]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("multisa", *parts)).removesuffix(".__init__")


def node_of(module: str) -> str:
    """The folder of a module; a module right in one of the five packages is a node by itself."""
    parts = module.split(".")
    path = ROOT.joinpath(*parts[1:])
    folder = parts if path.is_dir() else parts[:-1]
    return ".".join(parts if len(folder) <= 2 else folder)


def edges() -> Iterator[tuple[str, str]]:
    """(importing node, imported node), for every import, those inside functions included."""
    modules = {module_of(path) for path in sources()}
    for path in sources():
        module = module_of(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("multisa"):
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                compiled = f"multisa.kernels.{COMPILED}"
                target = full if full in modules or full == compiled else str(node.module)
                if node_of(module) != node_of(target):
                    yield node_of(module), node_of(target)


def test_no_circles_between_folders() -> None:
    graph: dict[str, set[str]] = {}
    for source, target in edges():
        if source != "multisa":  # the front door names everything
            graph.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join((*path[path.index(node) :], node))
        if node not in done:
            for target in sorted(graph.get(node, ())):
                visit(target, (*path, node))
            done.add(node)

    for node in sorted(graph):
        visit(node, ())


PROGRAM = """
import importlib, io, os, sys, traceback
root, modules = sys.argv[1], sys.argv[2:]
for heavy in ("numpy", "PIL.Image", "click", "tqdm", "torch", "onnx", "matplotlib.pyplot", "scipy.sparse"):
    try:
        importlib.import_module(heavy)
    except ImportError:
        pass

def culprit():
    "The line of ours that acts while its module is imported; None where it is the import system, or others."
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "importlib" in name or name.startswith("<frozen"):
            return None
        if name.startswith(root) and "/.venv" not in name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None

problems = []
def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "subprocess.Popen", "socket.connect"):
        line = culprit()
        if line:
            problems.append(f"{event} {arguments[:1]} at {line}")

class Environment(os._Environ):
    def __getitem__(self, key):
        line = culprit()
        if line:
            problems.append(f"reads the environment variable {key} at {line}")
        return super().__getitem__(key)

failed = 0
for module in modules:
    child = os.fork()
    if child:
        failed += os.waitpid(child, 0)[1] != 0
        continue
    shown, sys.stdout, sys.stderr = sys.stderr, io.StringIO(), io.StringIO()
    os.environ.__class__ = Environment
    sys.addaudithook(watch)
    try:
        importlib.import_module(module)
    except BaseException:
        problems.append(traceback.format_exc())
    printed = sys.stdout.getvalue() + sys.stderr.getvalue()
    if printed:
        problems.append(f"prints {printed!r}")
    for problem in problems:
        print(f"{module}: {problem}", file=shown)
    shown.flush()
    os._exit(bool(problems))
sys.exit(bool(failed))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="modules are imported in forked processes")
def test_importing_any_module_does_nothing_else() -> None:
    """No I/O, no output, no environment variable read; every module can be the first that is imported."""
    modules = [module_of(path) for path in sources() if path.name != "__main__.py"]
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *modules]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= MOST_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno + 1 <= MOST_FUNCTION_LINES, f"{node.name} at line {node.lineno}"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        around = "\n".join(lines[max(start - 4, 0) : node.body[0].lineno + 3])
        assert count <= MOST_PARAMETERS or REASON in around, f"{node.name}: {count} parameters, no reason"


def test_the_code_stays_small() -> None:
    files = [*sources(), ROOT / "setup.py", ROOT / "docs/hooks.py"]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert sum(lines.values()) <= MOST_LINES
    benchmarks = sum(count for path, count in lines.items() if path.is_relative_to(ROOT / "benchmarks"))
    assert benchmarks <= MOST_BENCHMARK_LINES
    assert len(list((ROOT / "runtime").rglob("*.py"))) <= MOST_RUNTIME_FILES


WORDS = re.compile(r"\b(crew|sitting|guest|contender|lane|suspects|under_way|heal|photograph)s?\b", re.IGNORECASE)


def test_words_of_our_own_are_gone() -> None:
    """The field's standard terms are used instead; CONTRIBUTING.md has the table."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if WORDS.search(line)
    ]
    assert not found, "\n".join(found[:20])
