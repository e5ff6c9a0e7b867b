"""A hot task merged into copies of the backbone's matrices."""

from collections.abc import Callable

import pytest
import torch

from pear_store import Store, Task
from router import Backbone, Router, RouterError
from tests.helpers.predictions import whole

Maker = Callable[..., Task]
LINEARS = ("blocks.0.attn.qkv", "blocks.3.attn.proj")


@pytest.fixture
def linear(task_maker: Maker) -> Callable[..., Task]:
    def make(name: str, seed: int = 0, **options: object) -> Task:
        made = task_maker(name, seed=seed, positions=LINEARS, **options)
        positions = {p: branches for p, branches in made.record["positions"].items() if p in LINEARS}
        positions[LINEARS[0]] = [*positions[LINEARS[0]], ["a0", -0.25]]  # two branches at once
        return Task({**made.record, "positions": positions}, made.tensors)

    return make


def forwards_with_own_matrices(router: Router) -> list[bool]:
    """For each forward, whether the first position ran with the backbone's own matrix."""
    module = router._adapted._module((48, 48)).get_submodule(LINEARS[0])
    pristine = module.weight
    seen: list[bool] = []
    module.register_forward_pre_hook(lambda part, _: seen.append(part.weight is pristine))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged_and_back_is_bit_identical(
    backbone: Backbone, linear: Callable[..., Task], task_maker: Maker, dtype: torch.dtype
) -> None:
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    router = Router(backbone, dtype=dtype, merge=True)
    plain = Router(backbone, dtype=dtype, merge=False)
    weights = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    for one in (router, plain):
        one.add(linear("t"))
        one.add(task_maker("other", seed=4))
    before = whole(router.run(images, ["t", "other"] * 2))
    seen = forwards_with_own_matrices(router)
    merged = whole(router.run(images, "t"))
    mixed = whole(router.run(images, ["t", "other"] * 2))
    assert seen == [False, True]
    exact = Router(backbone, merge=False)
    exact.add(linear("t"))
    truth = whole(exact.run(images, "t"))
    rounding = (whole(plain.run(images, "t")) - truth).abs().max()  # of the same precision, unmerged
    assert (merged - truth).abs().max() <= (2 * rounding if dtype == torch.bfloat16 else 1e-4)
    assert (merged - whole(router.run(images, "other"))).abs().max() > 20 * rounding
    assert torch.equal(mixed, before)
    assert torch.equal(whole(router.run(images, "other")), whole(plain.run(images, "other")))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone.module.state_dict().items())


def test_only_a_task_that_is_hot_is_merged(
    backbone: Backbone, linear: Callable[..., Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.merge.AUTO_ROWS", 16)
    router = Router(backbone)
    for i, name in enumerate(("hot", "cold")):
        router.add(linear(name, seed=i))
    seen = forwards_with_own_matrices(router)
    few = torch.zeros(4, 3, 48, 48)
    for _ in range(3):
        router.run(few, "hot")
    router.run(few, "cold")
    router.run(few, "hot")  # 3/4: what others ran counts against it
    assert seen == [True] * 5
    router.run(few, "hot")
    router.run(few, "cold")
    router.run(few, "hot")
    assert seen[5:] == [False, True, False]


def test_what_cannot_be_merged_runs_unmerged(
    backbone: Backbone, linear: Callable[..., Task], task_maker: Maker
) -> None:
    router = Router(backbone, merge=True)
    for task in (linear("relu", activation="relu"), task_maker("blocks")):
        router.add(task)
        router.run(torch.zeros(1, 3, 48, 48), task.name)
    assert router._merger.merges == 0
    with pytest.raises(RouterError, match="merge 'always': expected 'auto', True or False"):
        Router(backbone, merge="always")  # type: ignore[arg-type]


def test_a_new_version_is_merged_anew(backbone: Backbone, linear: Callable[..., Task], store: Store) -> None:
    images = torch.randn(2, 3, 48, 48)
    store.add(linear("t", seed=1))
    router = Router(backbone, store, merge=True)
    old = router.run(images, "t").logits
    store.add(linear("t", seed=2))
    router.refresh()
    router.run(images, "t@1")
    assert router._merger.held == router._find("t@1").key, "the old version's matrices are given back"
    new = router.run(images, "t").logits
    plain = Router(backbone, store, merge=False)
    torch.testing.assert_close(new, plain.run(images, "t").logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(old, plain.run(images, "t@1").logits, atol=1e-4, rtol=1e-4)
