"""The packages may import in one direction only: kernels <- runtime <- training <- export <- benchmarks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("kernels", "runtime", "training", "export", "benchmarks")
# What the light side must not name anywhere, and what it may import only inside functions.
NEVER_LIGHT = {"torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors"}
ONLY_INSIDE_FUNCTIONS = {
    *("onnxruntime", "openvino", "pycuda", "pydensecrf"),
    *("filelock", "fsspec", "prometheus_client", "pyarrow", "ray", "simplejpeg"),
    *("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"),
}
HEAVY = NEVER_LIGHT | ONLY_INSIDE_FUNCTIONS | {"numpy", "scipy", "matplotlib", "PIL", "tqdm"}  # to start with


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at module level) of every import in a file, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((str(node.module), id(node) not in inside))
    return found


def sources() -> list[Path]:
    return [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_the_lighter_side(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = ORDER[: ORDER.index(package) + 1]
    for module, _ in imports(path):
        first, *rest = module.split(".")
        assert first not in ORDER, f"{path}: write multisa.{module}"
        if first == "multisa":
            assert rest and rest[0] in allowed, f"{path}: {package} may not import {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_light_side_stays_light(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] in ("training", "export", "benchmarks"):
        return
    for module, at_module_level in imports(path):
        first = module.split(".")[0]
        assert first not in NEVER_LIGHT, f"{path}: imports {module}"
        assert not (at_module_level and first in ONLY_INSIDE_FUNCTIONS), f"{path}: {module} at module level"


def test_packages_listed_are_the_packages_there() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        "multisa." + ".".join(path.parent.relative_to(ROOT).parts)
        for package in ORDER
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert {"multisa", *found} == set(listed)


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        *(
            [name, "--help"]
            for name in ("train", "reproduce", "export", "convert", "parity", "build", "label", "doctor")
        ),
    ],
)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    program = (
        "import sys\n"
        "from multisa.runtime.cli.main import main\n"
        f"sys.argv = ['multisa', *{command!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
