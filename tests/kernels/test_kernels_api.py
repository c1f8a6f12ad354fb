"""The public names of the kernels, what importing them loads, and the direction of their imports."""

import ast
import subprocess
import sys
from pathlib import Path

import multisa.kernels

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
PUBLIC = {
    "ClassRuns",
    "CrfParameters",
    "DenseCRF",
    "absorb_small_parts",
    "affinity_from_boundary",
    "affinity_from_features",
    "confidence_levels",
    "deflate_mask",
    "dense_crf",
    "encode_rle",
    "enlarge_probabilities",
    "histogram",
    "joint_histogram",
    "path_offsets",
    "random_walk",
    "random_walk_reference",
    "stencil_offsets",
}
# A module may import from these folders of kernels, imports inside functions included.
ALLOWED = {"": {"", "common", "cuda"}, "common": {"common"}, "cuda": {"common", "cuda"}}


def test_public_names_are_documented() -> None:
    assert set(multisa.kernels.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(multisa.kernels, name).__doc__, name
        assert f"`{name}`" in str(multisa.kernels.__doc__), name


def test_importing_loads_no_cuda() -> None:
    program = (
        "import sys, multisa.kernels\n"
        "print([name for name in sys.modules if 'cuda' in name or name.split('.')[0] == 'torch'])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_folders_import_in_one_direction() -> None:
    for path in sorted(KERNELS.rglob("*.py")):
        folder = ".".join(path.parent.relative_to(KERNELS).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("multisa.kernels"):
                target = str(node.module).split(".")[2:]
                names = {alias.name for alias in node.names}
                imported = target[0] if target else next(iter(names & set(ALLOWED)), "")
                imported = imported if imported in ALLOWED else ""
                assert imported in ALLOWED[folder], f"{path}: imports {node.module}"
