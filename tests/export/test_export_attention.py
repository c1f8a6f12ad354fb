"""Attention in exported graphs: any number of tokens, blocks that do not fill, memory that stays small."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from multisa.export.attention import QUERY_BLOCK, attention_translation
from multisa.export.to_onnx import onnx_from_module
from multisa.runtime.errors import ParityError

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
MEASURE = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
image = np.ones((1, 100, 200, 3), np.uint8)
def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
session.run(None, {"image": image})
print(peak() - before)
"""


class Attention(nn.Module):
    """Two attentions among the pixels of an image, the second with the answers of the first as values."""

    def forward(self, image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        tokens = (image.to(dtype) / 64 - 2).flatten(1, 2)[:, None]
        once = functional.scaled_dot_product_attention(tokens, tokens, tokens[..., :2], scale=1.0)
        return functional.scaled_dot_product_attention(tokens, tokens, once, scale=1.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "attention.onnx"
    path.write_bytes(onnx_from_module(Attention(), ("attended",), {}, half_weights=False))
    return path


@pytest.mark.parametrize("block", [-QUERY_BLOCK + 1, -1, 0, 1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1])
def test_blocks_give_what_the_whole_matrix_gives(exported: Path, block: int) -> None:
    size = (2, 1, QUERY_BLOCK + block, 3)
    image = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"image": image.numpy()})
    np.testing.assert_allclose(got, Attention()(image, torch.float64).numpy(), atol=1e-5)


def test_its_nodes_have_names_that_last(exported: Path) -> None:
    model = onnx.load(exported)
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    assert [loop.name for loop in loops] == ["attention_0.loop", "attention_1.loop"]
    for number, loop in enumerate(loops):
        named = {node.name: node.op_type for node in loop.attribute[0].g.node if node.name}
        assert named == {
            f"attention_{number}.logits": "MatMul",
            f"attention_{number}.softmax": "Softmax",
            f"attention_{number}.attended": "MatMul",
        }
    assert {entry.domain for entry in model.opset_import} == {""}
    assert not model.functions


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_square_of_the_tokens(exported: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(exported)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 300_000  # KiB; the whole matrix of 20,000 tokens is 1.6 million


def test_attention_of_another_kind_is_refused() -> None:
    place = attention_translation()[ATTENTION]
    with pytest.raises(ParityError, match=r"scale 0\.5 and \[\]"):
        place(None, None, None, scale=0.5)
    with pytest.raises(ParityError, match="is_causal"):
        place(None, None, None, scale=1.0, is_causal=True)
