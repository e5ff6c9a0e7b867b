"""What is shared, and that sharing changes nothing but rounding."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from pear_store import Task, make_task
from router import Backbone, Router, choose_positions, load_backbone
from router import adapted as adapted_module
from router import batches as batches_module
from router.adapted import AdaptedBackbone
from router.sharing import bucket, by_level, plan
from tests.helpers.makers import floats, record
from tests.helpers.predictions import whole

LEVELS = 3
rows_of = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=12)
adds = st.lists(st.lists(st.sampled_from("ab"), min_size=LEVELS, max_size=LEVELS), min_size=4, max_size=4)


@given(rows_of, adds)
def test_every_row_walks_through_its_own_image_and_branches(
    rows: list[tuple[int, int]], branches: list[list[str]]
) -> None:
    images, tasks = np.array(rows).T
    walk = plan(images, tasks, branches)
    state: list[tuple[Any, ...]] = [(image,) for image in walk.start.tolist()]
    for level in range(LEVELS):
        if level in walk.grow:
            state = [state[row] for row in walk.grow[level].tolist()]
        run, left = divmod(len(state), len(walk.units[level]))
        assert left == 0
        state = [(*one, branches[walk.units[level][row // run]][level]) for row, one in enumerate(state)]
    ended = [state[row] for row in walk.end.tolist()]
    assert ended == [(image, *branches[task]) for image, task in rows]
    if len({image for image, _ in rows}) < len(rows):
        assert len(state) == len(set(ended)), "no row is computed twice"


def test_runs_of_one_task_are_one_unit() -> None:
    apart = [["a"], ["b"]]
    assert plan(np.arange(6), np.array([0, 1, 0, 1, 0, 1]), apart).units[0].tolist() == [0, 1]
    assert plan(np.arange(4), np.array([1, 1, 1, 1]), apart).units[0].tolist() == [1]
    assert plan(np.arange(3), np.array([0, 1, 0]), apart).units[0].tolist() == [0, 0, 1]


def test_rows_part_where_their_tasks_do() -> None:
    branches = [["x", "y", "a"], ["x", "y", "b"], ["x", "z", "a"]]
    walk = plan(np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 0, 1, 2]), branches)
    assert len(walk.start) == 2
    assert {level: len(rows) for level, rows in walk.grow.items()} == {1: 4, 2: 6}


def test_buckets_are_powers_of_two() -> None:
    walk = bucket(np.arange(5), np.array([0, 1, 0, 1, 2]))
    assert walk.start.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert walk.units[0].tolist() == [0, 1, 0, 1, 2, -1, -1, -1]
    assert len(bucket(np.arange(8), np.zeros(8, np.int64)).start) == 8


def test_levels_compare_positions_in_any_order() -> None:
    levels = {"p": 0, "q": 1, "r": 1}
    assert by_level({"r": 1, "q": 2, "p": 3}, levels, 2) == by_level({"p": 3, "q": 2, "r": 1}, levels, 2)
    assert by_level({}, levels, 2) == [(), ()]


FAMILIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 4}, "blocks", 4),
    "deit_tiny_distilled_patch16_224": ({"img_size": 32, "depth": 3}, "qkv", 3),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 28, "depth": 3, "embed_dim": 48, "num_heads": 3}, "blocks", 3),
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 3}, "blocks", 3),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)}, "blocks", 4,
    ),
    "convnext_tiny": ({"depths": (1, 1, 2, 1), "dims": (16, 24, 24, 24)}, "stages.*.blocks.*.mlp", 5),
}  # fmt: skip


def model_of(name: str) -> tuple[Backbone, str, int]:
    options, positions, blocks = FAMILIES[name]
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=5, **options).eval()
    with torch.no_grad():  # layer scale starts near zero and would hide what a branch adds
        for key, parameter in model.named_parameters():
            if key.endswith(("gamma", "gamma_1", "gamma_2")):
                parameter.fill_(1.0)
    size = options.get("img_size", 64)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    return load_backbone(model), positions, blocks


TREE = ["t0", "t1", "t2", "t3"]


def tree_of(backbone: Backbone, choice: str) -> dict[str, Task]:
    """Four tasks that share their first positions: two and two the same half, all the same first one."""
    size = backbone.input_size[0]
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32)
    positions = choose_positions(backbone.module, choice)
    adapted.attach(positions)
    made = {}
    for task, name in enumerate(TREE):
        tensors, branches = {}, {}
        for i, position in enumerate(positions):
            kind = 0 if i == 0 else task // 2 if i < len(positions) // 2 else task
            generator = np.random.default_rng((kind, i))
            d_in, d_out = adapted.widths[position]
            tensors[f"a{i}.down"] = floats(generator.normal(size=(d_in, 3)) / d_in**0.5)
            tensors[f"a{i}.up"] = floats(generator.normal(size=(3, d_out)) / 2)
            branches[position] = [[f"a{i}", 0.7]]
        adapters = {f"a{i}": {"down": f"a{i}.down", "up": f"a{i}.up"} for i in range(len(positions))}
        tensors["head.weight"] = floats(np.random.default_rng(task).normal(size=(2, adapted.feature_width)))
        tensors["head.bias"] = floats(np.zeros(2))
        made[name] = make_task(
            record(name, backbone={"model": backbone.name, "digest": backbone.digest}, adapters=adapters,
                   positions=branches, preprocess={**record()["preprocess"], "input_size": [3, size, size]}),
            tensors,
        )  # fmt: skip
    return made


def router_of(backbone: Backbone, choice: str) -> Router:
    """A router with the tasks of `tree_of`."""
    router = Router(backbone, merge=False)
    for task in tree_of(backbone, choice).values():
        router.add(task)
    return router


@pytest.mark.parametrize("name", FAMILIES)
def test_run_all_equals_separate_runs(name: str) -> None:
    backbone, choice, blocks = model_of(name)
    size = backbone.input_size[0]
    router = router_of(backbone, choice)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    rows: list[int] = []
    module = router._adapted._module((size, size))
    last = router._adapted.levels.blocks[-1]
    for block in (router._adapted.levels.blocks[0], last):
        module.get_submodule(block).register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    together = router.run_all(images, TREE)
    assert sum(b.startswith(("blocks", "layers", "stages")) for b in router._adapted.levels.blocks) >= blocks
    assert rows[0] == 3, "the trunk runs once for each image"
    for task in TREE:
        alone = router.run(images, task).logits
        torch.testing.assert_close(together[task].logits, alone, atol=2e-5, rtol=1e-4)
    different = (whole(together["t0"]) - whole(together["t1"])).abs().max()
    assert different > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_take_large_batches_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, choice, _ = model_of(name)
    size = backbone.input_size[0]
    images = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(1))
    mixes = (["t0"] * 7, ["t1", "t2"] * 3 + ["t3"], ["t0", "t0", "t0", "t1", "t1", "t1", "t2"])
    found: list[list[torch.Tensor]] = []
    seen: list[int] = []
    for limit in (adapted_module.PART_BYTES, 1, 3 * 4 * size * size * 3):
        monkeypatch.setattr(adapted_module, "PART_BYTES", limit)
        router = router_of(backbone, choice)
        module = router._adapted._module((size, size))
        last = module.get_submodule(router._adapted.levels.blocks[-1])
        inner = next(part for _, part in last.named_modules() if isinstance(part, torch.nn.LayerNorm))
        inner.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        outs = [router.run(images[: len(mix)], mix).logits for mix in mixes]
        outs.append(router.run(images[:6], ["t0", "t1"] * 3).logits)  # two runs of three rows
        outs += [one.logits for one in router.run_all(images, ["t0", "t1", "t2", "t3"]).values()]
        found.append([out if isinstance(out, torch.Tensor) else torch.stack(out) for out in outs])
        if limit == 1:
            assert set(seen) == {1}
        seen.clear()
    for at_once, single, several in zip(*found, strict=True):
        torch.testing.assert_close(single, at_once, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(several, at_once, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mvitv2_tiny", {"img_size": 64}),  # blocks give tuples
        ("gcvit_xxtiny", {}),  # blocks take a second tensor of the images
    ],
)
def test_blocks_that_take_or_give_more_than_one_tensor_stay_whole(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapted_module, "PART_BYTES", 1)
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=5, **options).eval()
    size = options.get("img_size", 224)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    backbone = load_backbone(model)
    router = router_of(backbone, "*.mlp")
    images = torch.randn(3, 3, *backbone.input_size, generator=torch.Generator().manual_seed(1))
    together = router.run_all(images, TREE)
    for task in TREE:
        alone = torch.stack([torch.as_tensor(router.run(image[None], task).logits[0]) for image in images])
        torch.testing.assert_close(together[task].logits, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "tasks", "limit", "expected"),
    [(6, 2, 7, [6] * 2), (6, 2, 5, [3] * 4), (6, 2, 2, [2] * 6), (2, 4, 3, [2] * 4), (2, 4, 7, [4] * 2)],
)
def test_parts_end_where_a_tasks_rows_do_or_divide_them(
    images: int, tasks: int, limit: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, choice, _ = model_of("vit_tiny_patch16_224")
    size = backbone.input_size[0]
    router = router_of(backbone, choice)
    names = [f"t{i}" for i in range(tasks)]
    asked = torch.zeros(images, 3, size, size)
    router.run_all(asked, names)
    given: list[torch.Tensor] = []
    last = router._adapted._module((size, size)).get_submodule(router._adapted.levels.blocks[-1])
    inner = next(part for _, part in last.named_modules() if isinstance(part, torch.nn.LayerNorm))
    inner.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    router.run_all(asked, names)
    monkeypatch.setattr(adapted_module, "PART_BYTES", limit * given.pop()[:1].nbytes)
    given.clear()
    router.run_all(asked, names)
    assert [len(x) for x in given] == expected


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, adapted_module.PART_BYTES])
@pytest.mark.parametrize(("choice", "first_given"), [("blocks.?", 6), ("*.mlp", 3)])
def test_a_block_grows_within_unless_its_branches_need_it_grown(
    choice: str, first_given: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapted_module, "PART_BYTES", limit)
    backbone, _, _ = model_of("vit_tiny_patch16_224")
    size = backbone.input_size[0]
    router = router_of(backbone, choice)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    names = ["t0", "t2"]  # they differ from the second position on
    apart = router._adapted.levels.blocks[1]
    alone = {name: router.run(images, name).logits for name in names}
    given: list[int] = []
    block = router._adapted._module((size, size)).get_submodule(apart)
    router.run_all(images, names)
    block.register_forward_pre_hook(lambda _, args: given.append(len(args[0])))
    together = router.run_all(images, names)
    assert given == [first_given]
    for name in names:
        torch.testing.assert_close(together[name].logits, alone[name], atol=2e-5, rtol=1e-4)


def test_a_cpus_forwards_take_few_images_together_but_one_images_tasks_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, choice, _ = model_of("vit_tiny_patch16_224")
    size = backbone.input_size[0]
    monkeypatch.setattr(batches_module, "SHARED_PIXELS_CPU", 4 * size * size)
    monkeypatch.setattr(batches_module, "SHARED_ROWS", 6)
    router = router_of(backbone, choice)
    images = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(1))
    alone = {name: router.run(images, name).logits for name in ("t0", "t1", "t2")}
    rows: list[int] = []
    features = router._adapted.features

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        found = features(*args, **options)
        rows.append(len(found))
        return found

    monkeypatch.setattr(router._adapted, "features", counted)
    for asked, names, expected in ((3, ["t0", "t1"], [4, 2]), (2, ["t0", "t1", "t2"], [3, 3])):
        together = router.run_all(images[:asked], names)
        assert rows == expected
        rows.clear()
        for name in names:
            torch.testing.assert_close(together[name].logits, alone[name][:asked], atol=2e-5, rtol=1e-4)
    router.run(images, ["t0"] * 7)
    assert rows == [7], "images that do not repeat go together"
    rows.clear()
    monkeypatch.setattr(batches_module, "SHARED_PIXELS_CPU", 1)
    router.run_all(images[:1], ["t0", "t1", "t2"])
    assert rows == [3], "one image's trunk runs once"
    rows.clear()
    monkeypatch.setattr(batches_module, "SHARED_ROWS", 2)
    router.run_all(images[:1], ["t0", "t1", "t2"])
    assert rows == [2, 1]
