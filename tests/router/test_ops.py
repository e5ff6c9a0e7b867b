"""The branch op against a plain loop, and the quantised form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.ops import PositionWeights, activate, add_branch
from router.tensors import dequantise, fake_quantise, from_torch, quantise, to_torch

PHI = {"identity": lambda h: h, "relu": torch.relu, "gelu": torch.nn.functional.gelu}


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("axes", [(5,), (2, 3)], ids=["tokens", "map"])
def test_one_task_for_all_rows(activation: str, axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, *axes, 6), torch.randn(4, *axes, 7)
    down, up = torch.randn(6, 3), torch.randn(3, 7)
    before = y.clone()
    out = add_branch(y, x, PositionWeights(down, up, activation))
    torch.testing.assert_close(out, y + PHI[activation](x @ down) @ up, atol=1e-5, rtol=1e-5)
    assert torch.equal(y, before)


@pytest.mark.parametrize("windows", [1, 3])
def test_each_row_has_its_own(windows: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4 * windows, 5, 6), torch.randn(4 * windows, 5, 7)
    down, up = torch.randn(4, 6, 3), torch.randn(4, 3, 7)
    masks = {"relu": torch.tensor([1, 0, 0, 1], dtype=torch.bool).view(-1, 1, 1)}
    masks["identity"] = ~masks["relu"]
    out = add_branch(y, x, PositionWeights(down, up, masks))
    for row in range(4):
        phi = torch.relu if row in (0, 3) else lambda h: h
        part = slice(row * windows, (row + 1) * windows)
        expected = y[part] + phi(x[part] @ down[row]) @ up[row]
        torch.testing.assert_close(out[part], expected, atol=1e-5, rtol=1e-5)


def test_concatenated_branches_equal_their_sum() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 6), torch.zeros(2, 5, 7)
    pairs = [(torch.randn(6, r), torch.randn(r, 7), s) for r, s in ((2, 0.5), (4, -1.5))]
    whole = PositionWeights(torch.cat([d for d, _, _ in pairs], 1), torch.cat([s * u for _, u, s in pairs]), "gelu")
    apart = sum(s * (activate(x @ d, "gelu") @ u) for d, u, s in pairs)
    torch.testing.assert_close(add_branch(y, x, whole), apart, atol=1e-5, rtol=1e-5)


def test_it_differentiates() -> None:
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    down = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    up = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d, u: add_branch(y, x, PositionWeights(d, u, "gelu")), (down, up))


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1]), st.integers(0, 99))
def test_quantised_matrices_come_back_and_requantise_alike(
    bits: int, rows: int, columns: int, axis: int, seed: int
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed, scale = quantise(matrix, bits, axis)
    assert packed.shape == ((rows * columns * bits + 7) // 8,)
    assert scale.shape == (matrix.shape[axis],)
    back = dequantise(packed, scale, (rows, columns), bits, axis)
    again = quantise(back, bits, axis)
    assert torch.equal(again[0], packed)
    torch.testing.assert_close(again[1].float(), scale.float(), rtol=2e-3, atol=1e-6)
    if bits == 1:
        assert torch.equal(back >= 0, matrix >= 0)
    else:
        step = scale.float().unsqueeze(1 - axis) / (2**bits - 1)
        assert bool(((back - matrix).abs() <= step * 1.05 + 1e-3).all())
    leaf = matrix.clone().requires_grad_()
    torch.testing.assert_close(fake_quantise(leaf, bits, axis), back, atol=1e-5, rtol=1e-5)
    slopes = torch.randn(rows, columns)
    (fake_quantise(leaf, bits, axis) * slopes).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, slopes)  # straight through


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8])
def test_tensors_survive_the_store(dtype: torch.dtype) -> None:
    for shape in ((3, 4), (), (0, 2)):
        tensor = (torch.rand(shape) * 100).to(dtype)
        back = to_torch(from_torch(tensor))
        assert back.dtype == dtype
        assert torch.equal(back, tensor)
    column = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(to_torch(from_torch(column)), column)
