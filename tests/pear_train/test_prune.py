"""Importance, pruning, sharing and knowledge: the maths."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_train.importance import gradient_scores, magnitude_scores
from pear_train.knowledge import exact_copy, fold, fold_cores, lowbit_copy
from pear_train.prune import choose_pruned, choose_sources, matrix_similarity, output_similarity

WIDTHS = {f"blocks.{i}.{kind}": (8, 8) for i in range(4) for kind in ("attn", "mlp")}
SCORES = dict(zip(WIDTHS, [5.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0], strict=True))


def test_taylor_score_is_the_squared_change_of_the_loss() -> None:
    """On a loss linear in each group, the score is what removing the adapter does, squared and averaged."""
    ups = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.zeros(2, 3, requires_grad=True)}
    slopes = [torch.randn(2, 3) for _ in range(4)]

    def loss(slope: torch.Tensor, without: str = "") -> torch.Tensor:
        terms = [(up * slope).sum() * (name != without) for name, up in ups.items()]
        return torch.stack(terms).sum()

    scores = gradient_scores("taylor", ups, [partial(loss, s) for s in slopes])
    expected = sum(float((loss(s) - loss(s, "a")).detach()) ** 2 for s in slopes) / 4
    assert scores["a"] == pytest.approx(expected, rel=1e-4)
    assert scores["b"] == 0
    assert ups["a"].grad is None
    absolute = gradient_scores("taylor_abs", ups, [partial(loss, s) for s in slopes])
    assert absolute["a"] == pytest.approx(
        sum(abs(float((loss(s) - loss(s, "a")).detach())) for s in slopes) / 4, rel=1e-4
    )
    slope = gradient_scores("gradient", ups, [partial(loss, s) for s in slopes])
    assert slope["b"] == pytest.approx(sum(float(s.square().sum()) for s in slopes) / 4, rel=1e-4)


def test_taylor_terms_of_up_and_down_agree_for_identity_and_relu() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(5, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    x, y = torch.randn(7, 5), torch.randn(7, 3)

    def loss(phi: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return (phi(x @ down) @ up - y).square().mean()

    for phi in (torch.nn.Identity(), torch.relu):
        scores = gradient_scores("taylor", {"up": up, "down": down}, [partial(loss, phi)])
        assert scores["up"] == pytest.approx(scores["down"], rel=1e-4)


def test_the_least_important_are_pruned_group_by_group() -> None:
    assert choose_pruned(SCORES, WIDTHS, 0.5) == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.3.mlp"]
    assert choose_pruned(SCORES, WIDTHS, 0.0) == []
    assert len(choose_pruned(SCORES, WIDTHS, 0.99)) == 7
    groups = {**WIDTHS, "blocks.0.attn": (8, 24), "blocks.1.attn": (8, 24)}
    pruned = choose_pruned(SCORES, groups, 0.5)
    assert sum(groups[p] == (8, 24) for p in pruned) == 1
    assert "blocks.0.attn" in pruned


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 0.999))
def test_pruning_keeps_at_least_one_and_the_best(scores: list[float], ratio: float) -> None:
    named = {f"p{i}": score for i, score in enumerate(scores)}
    pruned = choose_pruned(named, dict.fromkeys(named, (4, 4)), ratio)
    assert len(pruned) == min(int(ratio * len(scores) + 1e-9), len(scores) - 1)
    kept = [score for name, score in named.items() if name not in pruned]
    assert all(named[p] <= min(kept) for p in pruned)


def test_top_pairs_the_most_with_the_least_important_round_and_round() -> None:
    pruned = choose_pruned(SCORES, WIDTHS, 0.75)
    sources = choose_sources("top", pruned, SCORES, WIDTHS)
    best, second = "blocks.1.attn", "blocks.2.attn"
    assert sources == {
        "blocks.0.mlp": best,
        "blocks.1.mlp": second,
        "blocks.2.mlp": best,
        "blocks.3.mlp": second,
        "blocks.0.attn": best,
        "blocks.3.attn": second,
    }


def test_nearest_prefers_the_same_kind_of_module() -> None:
    scores = dict(zip(WIDTHS, [9.0, 1.0, 1.0, 9.0, 9.0, 1.0, 1.0, 9.0], strict=True))
    pruned = ["blocks.0.mlp", "blocks.1.attn", "blocks.2.mlp", "blocks.3.attn"]
    assert choose_sources("nearest", pruned, scores, WIDTHS) == {
        "blocks.0.mlp": "blocks.1.mlp",
        "blocks.1.attn": "blocks.0.attn",
        "blocks.2.mlp": "blocks.1.mlp",
        "blocks.3.attn": "blocks.2.attn",
    }
    lonely = ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp", "blocks.3.mlp"]
    assert choose_sources("nearest", lonely, scores, WIDTHS)["blocks.3.mlp"] == "blocks.3.attn"
    assert choose_sources("none", pruned, scores, WIDTHS) == {}


def test_similar_asks_the_similarity_and_keeps_shapes_apart() -> None:
    widths = {"a": (4, 4), "b": (4, 4), "c": (4, 4), "d": (4, 8), "e": (4, 8)}
    scores = dict.fromkeys(widths, 1.0)
    sources = choose_sources("similar", ["a", "d"], scores, widths, lambda p, k: {"c": 0.9, "b": 0.1, "e": -1}[k])
    assert sources == {"a": "c", "d": "e"}


def test_matrix_similarity_is_the_cosine_of_the_products() -> None:
    torch.manual_seed(0)
    one, other = (torch.randn(6, 2), torch.randn(2, 7)), (torch.randn(6, 3), torch.randn(3, 7))
    expected = output_similarity(one[0] @ one[1], other[0] @ other[1])
    assert matrix_similarity(one, other) == pytest.approx(expected, abs=1e-5)
    assert matrix_similarity(one, (one[0] * 3, one[1])) == pytest.approx(1.0, abs=1e-5)
    assert matrix_similarity(one, (torch.zeros(6, 2), one[1])) == 0.0


def residual(adapters: list[Any], down: torch.Tensor, up: torch.Tensor, scales: list[float]) -> float:
    return sum(float((d @ u - s * (down @ up)).square().sum()) for (d, u), s in zip(adapters, scales, strict=True))


def test_fold_is_exact_where_it_can_be_and_beats_what_it_replaces() -> None:
    torch.manual_seed(0)
    base = (torch.randn(6, 2), torch.randn(2, 7))
    multiples = [base, (base[0] * 0.5, base[1]), (-base[0], base[1])]
    down, up, scales = fold(multiples)
    assert residual(multiples, down, up, scales) < 1e-8
    assert down.shape == (6, 2)
    near = [(base[0] + 0.3 * torch.randn(6, 2), base[1] + 0.3 * torch.randn(2, 7)) for _ in range(4)]
    down, up, scales = fold(near)
    plain = residual(near, near[0][0], near[0][1], [1.0, 1.0, 1.0, 1.0])
    scaled = [
        float((d @ u * (near[0][0] @ near[0][1])).sum() / (near[0][0] @ near[0][1]).square().sum()) for d, u in near
    ]
    assert residual(near, down, up, scales) < residual(near, *near[0], scaled) < plain


def test_magnitude_is_the_matrix_norm() -> None:
    down, up = torch.randn(9, 3), torch.randn(3, 7)
    assert magnitude_scores({"a": (down, up)})["a"] == pytest.approx(float((down @ up).norm()), rel=1e-5)


def test_cores_are_exact_where_they_can_be_and_best_otherwise() -> None:
    torch.manual_seed(1)
    down, up = torch.randn(12, 3), torch.randn(3, 10)
    alike = [(down @ torch.randn(3, 3), up) for _ in range(4)]  # one space each side: nothing is lost
    d, u, cores = fold_cores(alike)
    for (one, other), core in zip(alike, cores, strict=True):
        torch.testing.assert_close(d @ core @ u, one @ other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.norm(dim=0), torch.ones(3))
    assert max(float(torch.linalg.matrix_norm(core, 2)) for core in cores) == pytest.approx(1, rel=1e-5)
    apart = [(torch.randn(12, 3), torch.randn(3, 10)) for _ in range(4)]
    d, u, cores = fold_cores(apart)
    lost = sum(float((d @ core @ u - a @ b).square().sum()) for (a, b), core in zip(apart, cores, strict=True))
    d1, u1, scales = fold(apart)
    lost_by_scales = sum(float((s * d1 @ u1 - a @ b).square().sum()) for (a, b), s in zip(apart, scales, strict=True))
    assert lost < 0.95 * lost_by_scales
    zero = (torch.randn(12, 3), torch.zeros(3, 10))
    assert all(bool(torch.isfinite(one).all()) for one in (*fold_cores([zero, zero])[:2], *fold_cores([zero, zero])[2]))


def test_fold_of_nothing_trained() -> None:
    zero = (torch.randn(6, 2), torch.zeros(2, 7))
    down, up, scales = fold([zero, zero])
    assert torch.isfinite(down).all()
    assert float((down @ up).abs().max()) == 0
    assert scales == [1.0, 0.0]


@pytest.mark.parametrize(("bits", "worst"), [(1, 0.75), (4, 0.12)])
def test_low_bit_copies_keep_most_of_the_matrices(bits: int, worst: float) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(64, 8), torch.randn(8, 64)
    copy = lowbit_copy(down, up, bits)
    assert copy.bits == bits
    assert float((copy.down - down).norm() / down.norm()) < worst
    assert output_similarity(copy.down @ copy.up, down @ up) > (0.55 if bits == 1 else 0.98)
    again = lowbit_copy(copy.down, copy.up, bits)
    torch.testing.assert_close(again.up, copy.up, rtol=2e-3, atol=1e-4)
    exact = exact_copy(down, up)
    assert torch.equal(exact.down, down.half().float())
