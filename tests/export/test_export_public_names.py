"""The public names of multisa.export: all there, loaded when used, documented."""

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest

from multisa import export

# Function -> its options and its result.
NAMES = {
    "build_engines": ("BuildOptions", "BuildResult"),
    "check_parity": ("ParityOptions", "ParityResult"),
    "export_bundle": ("ExportOptions", "ExportResult"),
    "quantize_bundle": ("QuantizeOptions", "QuantizeResult"),
}


def test_the_public_names_are_these() -> None:
    assert export.__all__ == sorted([*NAMES, *(name for pair in NAMES.values() for name in pair)])
    assert set(export.__all__) <= set(dir(export))
    with pytest.raises(AttributeError, match="has no attribute 'convert_bundle'"):
        _ = export.convert_bundle


@pytest.mark.parametrize(("name", "options", "result"), [(name, *pair) for name, pair in NAMES.items()])
def test_functions_are_documented_and_take_options(name: str, options: str, result: str) -> None:
    function = getattr(export, name)
    signature = inspect.signature(function)
    assert "Raises" in function.__doc__ and re.search(r"[Ww]rite", function.__doc__)
    assert len(signature.parameters) <= 6
    assert options in str(signature.parameters["options"])
    assert signature.return_annotation is getattr(export, result)
    for kind in (getattr(export, options), getattr(export, result)):
        assert kind.__dataclass_params__.frozen and kind.__doc__ and dataclasses.fields(kind)
    assert callable(getattr(export, result).describe) and callable(getattr(export, result).as_json)


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("__all__", ("torch", "onnx", "onnxruntime", "numpy", "tensorrt_rtx")),
        ("check_parity", ("torch", "onnx")),
        ("build_engines", ("torch", "onnx", "onnxruntime")),
        ("quantize_bundle", ("torch",)),
    ],
)
def test_a_name_loads_what_it_needs_and_no_more(name: str, absent: tuple[str, ...]) -> None:
    program = (
        f"import sys, multisa.export as export\nexport.{name}\n"
        f"loaded = {set(absent)!r} & set(sys.modules)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
