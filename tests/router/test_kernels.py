"""The Triton kernel against the plain op: in Triton's interpreter on a CPU, compiled on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from router.ops import PositionWeights, add_branch

pytest.importorskip("triton", reason="Triton is not there: the plain op is all there is")

from router import kernels
from router.kernels import add_branch_fused, can_fuse, use_fused

# The interpreter of Triton 3.2 to 3.4, where NumPy warns of it
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATOL = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
# Triton's interpreter cuts bfloat16 off where a GPU rounds: inputs, φ(x · down) and the sum, 2^-7 each
RTOL = {torch.float32: 0, torch.bfloat16: 2e-2, torch.float16: 0}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weights(groups: int | None, d_in: int, d_out: int, rank: int, activation: Any = "identity") -> PositionWeights:
    """As the slots make them: `down` is a transposed view."""
    lead = () if groups is None else (groups,)
    down = draw(*lead, rank, d_in, seed=1).transpose(-1, -2) / d_in**0.5
    return PositionWeights(down, draw(*lead, rank, d_out, seed=2), activation)


def reference(y: Tensor, x: Tensor, given: PositionWeights) -> Tensor:
    """The plain op in float64."""
    wide = PositionWeights(given.down.double(), given.up.double(), given.activation)
    return add_branch(y.double(), x.double(), wide)


@pytest.mark.parametrize("dtype", ATOL, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("groups", [None, 3], ids=["shared", "own"])
def test_it_equals_the_plain_op(dtype: torch.dtype, activation: str, groups: int | None) -> None:
    x, y = draw(3, 37, 48, dtype=dtype), draw(3, 37, 80, dtype=dtype, seed=3)
    given = weights(groups, 48, 80, 5, activation)
    before = y.clone()
    out = add_branch_fused(y, x, given)
    assert out.dtype == dtype
    assert torch.equal(y, before)
    torch.testing.assert_close(out.double(), reference(y, x, given), atol=ATOL[dtype], rtol=RTOL[dtype])
    torch.testing.assert_close(out, add_branch(y, x, given), atol=ATOL[dtype], rtol=2e-2)


def test_rows_with_their_own_activations() -> None:
    x, y = draw(3, 20, 16), draw(3, 20, 24, seed=3)
    masks = {name: torch.tensor([i == j for j in range(3)], device=DEVICE).view(3, 1, 1)
             for i, name in enumerate(("gelu", "identity", "relu"))}  # fmt: skip
    given = weights(3, 16, 24, 3, masks)
    torch.testing.assert_close(add_branch_fused(y, x, given).double(), reference(y, x, given), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("x_shape", "d_out", "groups", "rank"),
    [
        ((6, 5, 16), 7, 2, 1),  # windows of a row, a width that is no multiple of a tile
        ((2, 3, 4, 20), 70, 2, 17),  # feature maps; a rank just over a tile
        ((4, 130), 16, None, 128),  # tokens are the batch; the largest rank
        ((2, 65, 8), 8, 2, 2),  # one token more than a tile
    ],
)
def test_odd_shapes(x_shape: tuple[int, ...], d_out: int, groups: int | None, rank: int) -> None:
    x, y = draw(*x_shape), draw(*x_shape[:-1], d_out, seed=3)
    given = weights(groups, x_shape[-1], d_out, rank)
    torch.testing.assert_close(add_branch_fused(y, x, given).double(), reference(y, x, given), atol=5e-5, rtol=0)


def test_views_and_writing_in_place() -> None:
    x = draw(16, 9, 2).transpose(0, 2)  # [2, 9, 16], not contiguous
    y = draw(24, 9, 2, seed=3).transpose(0, 2)
    given = weights(2, 16, 24, 3)
    expected = reference(y, x, given)
    torch.testing.assert_close(add_branch_fused(y, x, given, in_place=True).double(), expected, atol=2e-5, rtol=0)
    y = y.contiguous()
    out = add_branch_fused(y, x, given, in_place=True)
    assert out.data_ptr() == y.data_ptr()
    torch.testing.assert_close(y.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_off_cuda_the_plain_op_is_used() -> None:
    x, y, given = (
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 5),
        PositionWeights(torch.randn(4, 2), torch.randn(2, 5), "relu"),
    )
    assert not use_fused(y, x, given)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed, with every tensor taken for one that the kernel takes."""
    ran: list[str] = []
    monkeypatch.setattr(kernels, "_faster", {})
    monkeypatch.setattr(kernels, "can_fuse", lambda *_: True)
    monkeypatch.setattr(kernels, "add_branch", lambda *_: ran.append("plain"))
    monkeypatch.setattr(kernels, "add_branch_fused", lambda *_: ran.append("fused"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return ran


@pytest.mark.parametrize("winner", ["plain", "fused"])
def test_the_faster_one_is_kept_to(timed: list[str], monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    monkeypatch.setattr(kernels, "_milliseconds", lambda call: (call(), 1.0 if timed[-1] == winner else 2.0)[1])
    x, y, given = (
        torch.randn(2, 30, 4),
        torch.randn(2, 30, 5),
        PositionWeights(torch.randn(4, 2), torch.randn(2, 5), "relu"),
    )
    assert [use_fused(y, x, given) for _ in range(3)] == [winner == "fused"] * 3
    assert timed == ["plain", "fused"]  # once
    use_fused(torch.randn(1, 300, 5), torch.randn(1, 300, 4), given)
    assert len(timed) == 4  # another shape is another question


def test_nothing_is_timed_while_a_cuda_graph_is_captured(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    given = PositionWeights(torch.randn(4, 2), torch.randn(2, 5), "relu")
    assert not use_fused(torch.randn(2, 3, 5), torch.randn(2, 3, 4), given)
    assert timed == []


def test_what_is_compiled_has_the_plain_op_and_no_graph_break(timed: list[str]) -> None:
    def branch(y: Tensor, x: Tensor, given: PositionWeights) -> Tensor:
        return -y if use_fused(y, x, given) else y + 1

    given = PositionWeights(torch.randn(4, 2), torch.randn(2, 5), "relu")
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    compiled = torch.compile(branch, backend="eager", fullgraph=True)
    assert torch.equal(compiled(y, x, given), y + 1)
    assert timed == []


@pytest.mark.slow
def test_everything_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from router.kernels import use_fused; from router.ops import PositionWeights\n"
        "w = PositionWeights(torch.ones(4, 2), torch.ones(2, 5), 'relu')\n"
        "assert not use_fused(torch.ones(1, 3, 5), torch.ones(1, 3, 4), w)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_compiles_for_gpus() -> None:
    """Without one: to machine code, in a process in which kernels are not interpreted."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from router.kernels import _branch
for dtype, activation, capability in (("bf16", -1, 80), ("fp32", 2, 80), ("fp16", 1, 90)):
    constants = dict(CODE=activation, DOT=triton.language.dtype(dtype),
                     BLOCK_TOKEN=64, BLOCK_DIM=64, BLOCK_RANK=16)
    types = dict.fromkeys(_branch.arg_names, "i32") | dict.fromkeys(constants, "constexpr") | dict(codes="*i32")
    types |= dict.fromkeys(("out", "y", "x", "down", "up"), "*" + dtype)
    made = triton.compile(ASTSource(_branch, types, constants), target=GPUTarget("cuda", capability, 32))
    print(len(made.asm["cubin"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")
@pytest.mark.parametrize("dtype", ATOL, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_whole_vit_position_on_a_gpu(dtype: torch.dtype) -> None:
    x, y = draw(64, 197, 768, dtype=dtype), draw(64, 197, 768, dtype=dtype, seed=3)
    given = weights(64, 768, 768, 8, "gelu")
    assert can_fuse(y, x, given)
    torch.testing.assert_close(
        add_branch_fused(y, x, given).double(), reference(y, x, given), atol=2 * ATOL[dtype], rtol=1e-2
    )
    assert use_fused(y, x, given) in (True, False)
