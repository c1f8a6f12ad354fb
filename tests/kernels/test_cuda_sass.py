"""What the CUDA kernels ask of memory, counted in the machine code (SASS) of every architecture; none is run.

What a kernel is built for, such as a weight that is read once for all channels, can be lost without one wrong
result; here it shows as a count. An operation counts once, however often a loop comes by it. nvcc does not
always make the same code of the same source, so most counts have a bound that follows from the design.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_code import compiled, kernel_names

from multisa.kernels.common.stencil import stencil_offsets
from multisa.kernels.cuda.build import ARCHITECTURES

pytestmark = pytest.mark.slow

KERNEL = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
OPERATION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
ATOMIC = {"ATOM": "global", "ATOMG": "global", "RED": "global", "REDG": "global", "ATOMS": "shared"}
ATOMIC_MODIFIERS = {"ADD": "ADD", "POPC": "ADD", "MIN": "MIN", "OR": "OR", "CAS": "CAS"}

# All kernels with atomics, and which. Nothing is added up in global memory: the order of floating-point sums,
# and with it the last bits of the result, would change from run to run.
ATOMICS = {
    # Bad input sets a bit of the error word.
    "walk_weights": {"global OR"},
    "walk_start": {"global OR"},
    "affinity_features": {"global OR"},
    "affinity_features_any": {"global OR"},
    "affinity_boundary": {"global OR"},
    "crf_unary": {"global OR"},
    "crf_unary_of_labels": {"global OR"},
    "lattice_number": {"global OR"},
    # CAS takes a slot of the hash table for a key, MIN notes the first touch of a vertex.
    "lattice_insert_2": {"global CAS", "global MIN", "global OR"},
    "lattice_insert_5": {"global CAS", "global MIN", "global OR"},
    # The histogram of a block.
    "radix_count": {"shared ADD"},
    "radix_scatter": {"shared ADD"},
}

RUN = 4  # pixels of a thread, side by side, in the walk and the affinities
PAIRS = stencil_offsets(5)
PRODUCTS = 2 * RUN * len(PAIRS)  # of a thread for each channel: every pair forwards and backwards
CORNERS = 3 + 6  # of a pixel's simplices in the spatial and the bilateral lattice

on_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@dataclass(frozen=True)
class Code:
    """The operations of one kernel, modifiers included, and how often each is there."""

    operations: Counter[str]

    def count(self, *names: str) -> int:
        """How many operations have one of these names, whatever their modifiers."""
        return sum(self.sizes(*names).values())

    def sizes(self, *names: str) -> Counter[int]:
        """The same by the bytes that a thread moves."""
        sizes: Counter[int] = Counter()
        for operation, count in self.operations.items():
            name, *modifiers = operation.split(".")
            if name in names:
                sizes[next((SIZES[word] for word in modifiers if word in SIZES), 4)] += count
        return sizes

    def atomics(self) -> set[str]:
        """The memory and kind of the atomic operations; what is not in the table above appears as it is."""
        found = set()
        for operation in self.operations:
            name, *modifiers = operation.split(".")
            if name in ATOMIC:
                kinds = [ATOMIC_MODIFIERS[word] for word in modifiers if word in ATOMIC_MODIFIERS]
                found.add(f"{ATOMIC[name]} {kinds[0]}" if kinds else operation)
        return found

    def fused(self) -> int:
        """Fused multiply-adds of fp32. HFMA2 is none: the compiler writes constants with it."""
        return self.count("FFMA") + 2 * self.count("FFMA2")


Codes = dict[int, dict[str, Code]]


def find_disassembler(nvcc: Path) -> Path | None:
    """Return nvdisasm from the toolkit, PATH or the package nvidia-cuda-nvdisasm; None if there is none."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvdisasm")
    candidates = [Path(home) / "bin" / "nvdisasm"] if home else []
    candidates += [nvcc.resolve().with_name("nvdisasm")]
    candidates += [Path(on_path)] if on_path else []
    candidates += sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*/bin/nvdisasm"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def disassemble(disassembler: Path, cubin: Path) -> dict[str, Code]:
    """The operations of every kernel of a cubin, by its name."""
    command = [str(disassembler), "--print-code", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    _, *parts = KERNEL.split(result.stdout)
    return {name: Code(Counter(OPERATION.findall(text))) for name, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.fixture(scope="module")
def codes(nvcc: Path) -> Codes:
    """The kernels of all architectures."""
    disassembler = find_disassembler(nvcc)
    if disassembler is None:
        pytest.skip("nvdisasm: not found in CUDA_HOME, beside nvcc, on PATH or as the package nvidia-cuda-nvdisasm")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda sm: disassemble(disassembler, compiled(nvcc, sm).cubin), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, found, strict=True))


@on_architectures
def test_every_access_knows_its_memory(codes: Codes, architecture: int) -> None:
    kernels = codes[architecture]
    assert set(kernels) == kernel_names()
    for name, code in kernels.items():
        assert code.count("EXIT"), name
        # Local memory is that of spilled registers and of arrays with an index that is not a constant.
        assert not code.count("LDL", "STL"), name
        # A generic access looks up at run time whether an address is global, shared or local.
        assert not code.count("LD", "ST"), name


@on_architectures
def test_atomics_are_where_they_are_meant_to_be(codes: Codes, architecture: int) -> None:
    found = {name: code.atomics() for name, code in codes[architecture].items()}
    assert {name: atomics for name, atomics in found.items() if atomics} == ATOMICS


@on_architectures
def test_double_precision_is_for_row_sums_alone(codes: Codes, architecture: int) -> None:
    # There it makes the sums exact. Elsewhere it would come from a constant without its f, at 1/32 or 1/64 of
    # the rate of fp32 on most devices.
    doubles = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
    assert {name for name, code in codes[architecture].items() if code.count(*doubles)} == {"walk_row_sums"}


@on_architectures
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_walk_step(codes: Codes, architecture: int, channels: int) -> None:
    code = codes[architecture][f"walk_step_{channels}"]
    loads = code.sizes("LDG")
    # States are read and written by 16 bytes a thread.
    assert set(code.sizes("STG")) == set(code.sizes("STS")) == {16}
    # So the narrower loads are weights, no more of them for four channels than for one: forwards, the four of
    # a pair are one aligned run; backwards they begin at column -dx, and are in one or two.
    runs = sum(1 + len({(pixel - dx) // RUN for pixel in range(RUN)}) for _, dx in PAIRS)
    assert loads.total() - loads[16] <= runs == 93
    # They are turned into fp32 once for all channels, too.
    assert code.count("HADD2", "F2F") <= PRODUCTS
    # The rows of a channel, five in either direction, are three loads from shared memory each.
    assert code.count("LDS") <= 3 * 2 * 5 * channels
    # Every product is fused with its sum. So c channels take (93 + 30 c) / 272 c loads a product at most:
    # 0.45 loads with one channel, 0.20 with four.
    assert code.fused() >= PRODUCTS * channels
    assert not code.count("FADD", "FADD2")
    # Once the tile is there, threads have nothing to wait for: steps are kept apart by their launches.
    assert code.count("BAR") == 1


@on_architectures
def test_affinities(codes: Codes, architecture: int) -> None:
    code = codes[architecture]["affinity_features"]
    # A row of a feature is three loads from shared memory and the thread's own pixels a fourth. Even the
    # farthest row has five pairs, each a difference and its sum for four pixels.
    assert code.count("LDS") / code.count("FADD") <= 4 / (5 * 2 * RUN)


@on_architectures
def test_labels_enlarge(codes: Codes, architecture: int) -> None:
    code = codes[architecture]["labels_enlarge"]
    rows = 4  # of a thread
    # A class is four corners, loaded again only where a row is in the next row of cells; a pixel has an id.
    assert code.sizes("LDG") == {4: 4 * rows + rows}
    assert code.sizes("STG") == {1: 2 * rows}
    assert code.fused() >= 3 * rows
    # Pixels have nothing to do with each other.
    assert not code.count("LDS", "STS", "SHFL", "BAR")


@on_architectures
@pytest.mark.parametrize("lanes", [4, 8, 16, 24, 32])
def test_crf_update(codes: Codes, architecture: int, lanes: int) -> None:
    code = codes[architecture][f"crf_update_{lanes}"]
    loads, stores = code.sizes("LDG"), code.sizes("STG")
    # The values of a vertex come by 16 bytes. A corner also has a number of its vertex and a weight, a label
    # an energy and, in the last update, a channel.
    assert set(loads) == {4, 16}
    assert loads[16] == CORNERS * lanes // 4
    assert loads[4] <= 2 * CORNERS + 2 * lanes
    # Beliefs leave by 16 bytes; the last update writes planes instead.
    assert set(stores) == {4, 16}
    assert stores[16] == lanes // 4
    assert code.fused() >= CORNERS * lanes
    # Pixels have nothing to do with each other.
    assert not code.count("LDS", "STS", "SHFL", "BAR")


@on_architectures
@pytest.mark.parametrize("lanes", [4, 8])
def test_crf_splat(codes: Codes, architecture: int, lanes: int) -> None:
    code = codes[architecture][f"crf_splat_{lanes}"]
    loads = code.sizes("LDG")
    # A touch is an entry of 8 bytes and a quad of beliefs, which takes four products; the other loads are the
    # number of vertices and where the entries of one start and end, for groups and for whole blocks.
    assert set(loads) == {4, 8, 16}
    assert loads[8] == loads[16]
    assert loads[4] <= 5
    assert code.fused() == 4 * loads[16]
    # The block asks whether one of its vertices is hot; only if so are there two more.
    assert code.count("BAR") == 3


@on_architectures
def test_crf_blur(codes: Codes, architecture: int) -> None:
    code = codes[architecture]["crf_blur"]
    loads, stores = code.sizes("LDG"), code.sizes("STG")
    # A quad of labels takes in its own values and those of two neighbours, whose numbers are one load. The
    # one other load is the number of vertices.
    assert set(stores) == {16}
    assert loads == {4: 1, 8: stores[16], 16: 3 * stores[16]}
    assert not code.count("LDS", "STS", "SHFL", "BAR")
