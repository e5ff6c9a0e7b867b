"""The router against a plain float32 loop over rows."""

import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

import router.preprocess as preprocess_module
from pear_store import PearStoreError, RawTensor, Store, Task, make_task, write_checkpoint
from pear_store.format.codes import matrix_values, up_values
from router import (
    Backbone,
    BackboneError,
    ImageError,
    Predictions,
    Router,
    RouterError,
    SlotBudgetError,
    TaskError,
    UnknownTaskError,
    WrongBackboneError,
)
from router.tensors import dequantise, from_torch, quantise, to_torch
from tests.helpers.makers import floats
from tests.helpers.predictions import whole

Maker = Callable[..., Task]
PHI = {"identity": lambda h: h, "relu": torch.relu, "gelu": F.gelu}


@torch.inference_mode()
def reference(backbone: Backbone, task: Task, image: torch.Tensor) -> torch.Tensor:
    """Logits of one image, branch by branch, with plain hooks."""
    hooks = []
    for position, branches in task.positions.items():

        def hook(_: object, args: tuple[torch.Tensor], y: torch.Tensor, branches: Any = branches) -> torch.Tensor:
            for branch in branches:
                adapter = task.adapters[branch.adapter]
                values = matrix_values(adapter.down, task.tensors), up_values(adapter, task.tensors)
                down, up = (torch.tensor(one).float() for one in values)
                y = y + branch.scale * (PHI[task.activation](args[0] @ down) @ up)
            return y

        hooks.append(backbone.module.get_submodule(position).register_forward_hook(hook))
    features: torch.Tensor = backbone.module(image.unsqueeze(0))[0]
    for one in hooks:
        one.remove()
    if task.head is None:
        return features
    weight = torch.tensor(matrix_values(task.head.weight, task.tensors))
    return F.linear(features, weight, to_torch(task.tensors[task.head.bias]))


@pytest.fixture
def tasks(task_maker: Maker) -> dict[str, Task]:
    """Unlike in rank, class count, activation and positions; two share all adapters."""
    made = [
        task_maker("a", seed=1, rank=4, classes=3),
        task_maker("b", seed=2, rank=1, classes=5, activation="relu"),
        task_maker("c", seed=3, rank=6, classes=3, activation="gelu", positions=("blocks.1.mlp", "blocks.2.mlp")),
        task_maker("d", seed=1, rank=4, classes=4),
        task_maker("f", seed=5, headless=True),
    ]
    return {task.name: task for task in made}


@pytest.fixture
def router(backbone: Backbone, tasks: dict[str, Task]) -> Router:
    made = Router(backbone)
    for task in tasks.values():
        made.add(task)
    return made


MIXES = {
    "identical": ["a"] * 8,
    "distinct": ["a", "b", "c", "d", "f"],
    "uniform": ["a", "b", "c", "d"] * 2,
    "skewed": ["c"] + ["a"] * 6 + ["b"],
    "zipf": ["a", "a", "a", "a", "b", "b", "c", "d"],
}


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_equals_a_plain_loop_and_each_row_alone(
    backbone: Backbone, router: Router, tasks: dict[str, Task], mix: str
) -> None:
    names = MIXES[mix]
    images = torch.randn(len(names), 3, 48, 48, generator=torch.Generator().manual_seed(0))
    out = router.run(images, names)
    for row, name in enumerate(names):
        torch.testing.assert_close(out.logits[row], reference(backbone, tasks[name], images[row]), atol=1e-4, rtol=1e-4)
        alone = router.run(images[row : row + 1], name)
        torch.testing.assert_close(out.logits[row], alone.logits[0], atol=1e-5, rtol=1e-5)


def test_adapters_matter(router: Router, backbone: Backbone, tasks: dict[str, Task]) -> None:
    images = torch.randn(2, 3, 48, 48)
    bare = tasks["f"]
    plain = make_task({**bare.record, "task": "plain", "adapters": {}, "positions": {}}, {})
    router.add(plain)
    with torch.inference_mode():
        torch.testing.assert_close(router.run(images, "plain").logits, backbone.module(images), atol=1e-5, rtol=1e-5)
    difference = whole(router.run(images, "f")) - whole(router.run(images, "plain"))
    assert difference.abs().max() > 0.05


def test_predictions(router: Router) -> None:
    images = torch.randn(3, 3, 48, 48)
    same = router.run(images, ["a", "a", "a"])
    assert isinstance(same.logits, torch.Tensor)
    assert same.logits.shape == (3, 3)
    torch.testing.assert_close(torch.stack(list(same.probs)).sum(1), torch.ones(3))
    mixed = router.run(images, ["a", "b", "f"])
    assert [len(row) for row in mixed.logits] == [3, 5, 192]
    assert mixed.labels == [f"a-{int(mixed.logits[0].argmax())}", f"b-{int(mixed.logits[1].argmax())}", None]
    assert mixed.tasks == ["a", "b", "f"]
    top = mixed.topk(4)
    assert [len(row) for row in top] == [3, 4, 0]
    assert top[1][0][0] == mixed.labels[1]
    assert top[1][0][1] == pytest.approx(float(mixed.probs[1].max()))
    assert len(mixed) == 3


def test_run_all(router: Router) -> None:
    images = torch.randn(2, 3, 48, 48)
    out = router.run_all(images, ["a", "b"])
    assert isinstance(out["a"], Predictions)
    for name in ("a", "b"):
        torch.testing.assert_close(out[name].logits, router.run(images, name).logits)


def test_kinds_of_images_agree(router: Router, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (30, 40), dtype=np.uint8)
    colour = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    given: list[Any] = [
        grey,
        grey[..., None],
        Image.fromarray(grey),
        str(tmp_path / "grey.png"),
        f"file://{tmp_path}/grey.png",
    ]
    given += [colour, Image.fromarray(colour), tmp_path / "colour.png"]
    logits = router.run(given, "a").logits
    for row in range(1, 5):
        assert torch.equal(logits[row], logits[0]) or torch.allclose(logits[row], logits[0], atol=1e-5)
    for row in (6, 7):
        torch.testing.assert_close(logits[row], logits[5], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[5], logits[0], atol=1e-3)


def test_images_are_grouped_by_preprocessing_and_come_back_in_order(
    backbone: Backbone, router: Router, task_maker: Maker
) -> None:
    router.add(task_maker("large", seed=8, size=64))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (50, 50, 3), dtype=np.uint8) for _ in range(4)]
    names = ["large", "a", "large", "b"]
    out = router.run(images, names)
    for row, name in enumerate(names):
        torch.testing.assert_close(out.logits[row], router.run([images[row]], name).logits[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ImageError, match="tasks 'large', 'a' differ in preprocessing: give a list of images"):
        router.run(torch.zeros(2, 3, 48, 48), ["large", "a"])


@pytest.mark.parametrize(
    ("images", "task", "message"),
    [
        (torch.zeros(2, 3, 40, 40), "a", "images: expected 48 x 48 pixels, found 40 x 40"),
        (torch.zeros(2, 1, 48, 48), "a", r"images float32 \[2, 1, 48, 48\]: expected normalised floats"),
        (torch.zeros(2, 3, 48, 48, dtype=torch.uint8), "a", r"images uint8 .*expected normalised floats"),
        (torch.zeros(2, 3, 48, 48), ["a"], "2 images but 1 task:"),
        (torch.zeros(0, 3, 48, 48), "a", "no images"),
        (["nowhere.png"], "a", "nowhere.png: no such file"),
        ("photo.png", "a", "photo.png: no such file"),
        ([np.zeros((4, 4), np.float32)], "a", r"array image float32 \[4, 4\]: expected uint8"),
        ([3], "a", "image of type int: expected a PIL image"),
        (None, "a", "images is one NoneType: expected an image, or a list of images"),
        (
            np.zeros((3, 48, 40), np.uint8),
            "a",
            r"images uint8 \[3, 48, 40\]: expected an array \[batch, h, w, 1, 3 or 4\], or \[h, w\]",
        ),
        (["nowhere://x/a.png"], "a", "nowhere://x/a.png: protocol 'nowhere' is not opened unless allowed"),
    ],
)
def test_image_mistakes(router: Router, images: Any, task: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        router.run(images, task)


def test_a_backbone_given_by_name_is_put_on_the_gpu_where_there_is_one(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Router("pear_tiny") as router:
        assert router.device == torch.device("cpu")
    asked: list[torch.device] = []

    def opened(device: torch.device) -> torch.device:
        asked.append(torch.device(device))
        return torch.device("cpu")

    monkeypatch.setattr("router.router.open_device", opened)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for given, device in (("pear_tiny", None), (backbone, None), ("pear_tiny", "cpu")):
        with Router(given, device=device):
            pass
    assert [device.type for device in asked] == ["cuda", "cpu", "cpu"]


def test_devices_and_precisions_that_are_not(backbone: Backbone, router: Router) -> None:
    for device in ("gpu", "cuda:99"):
        with pytest.raises(BackboneError, match=f"device '{device}' cannot be used: "):
            Router(backbone, device=device)
    with pytest.raises(BackboneError, match="dtype torch.int8: expected torch.float32"):
        Router(backbone, dtype=torch.int8)
    with pytest.raises(UnknownTaskError, match="tasks is one name, 'a': expected a list"):
        router.run_all(torch.zeros(1, 3, 48, 48), "a")


def test_unknown_and_wrong_tasks(router: Router, backbone: Backbone, task_maker: Maker, tmp_path: Path) -> None:
    with pytest.raises(UnknownTaskError, match="task None: expected a task's name"):
        router.run(torch.zeros(1, 3, 48, 48), None)  # type: ignore[arg-type]
    with pytest.raises(UnknownTaskError, match="no task 'x': it was not added, and this router has no store"):
        router.run(torch.zeros(1, 3, 48, 48), "x")
    good = task_maker("g")
    other = make_task({**good.record, "backbone": {"model": "vit_huge", "digest": "sha256:" + "a" * 64}}, good.tensors)
    with pytest.raises(WrongBackboneError) as caught:
        router.add(other)
    for part in ("'g'", "vit_huge", "sha256:aaaaaaaaaaaa", "pear_tiny", backbone.digest[:19]):
        assert part in str(caught.value)
    moved = make_task({**good.record, "positions": {"blocks.9.attn": [["a0", 1.0]]}}, good.tensors)
    with pytest.raises(TaskError, match=r"task 'g': backbone pear_tiny has no module 'blocks.9.attn'"):
        router.add(moved)
    fat = make_task({**good.record, "positions": {"blocks.0.mlp.fc1": [["a0", 1.0]]}}, good.tensors)
    with pytest.raises(TaskError, match=r"expected the backbone's widths \(192, 384\), found \(192, 192\)"):
        router.add(fat)
    headed = make_task(good.record, {**good.tensors, "head.weight": floats(np.zeros((3, 100)))})
    with pytest.raises(TaskError, match="its head: expected the backbone's 192 features, found 100"):
        router.add(headed)
    with Store.create(tmp_path / "s") as store:
        store.add(other)
        served = Router(backbone, store)
        with pytest.raises(WrongBackboneError):
            served.run(torch.zeros(1, 3, 48, 48), "g")
        with pytest.raises(UnknownTaskError, match="no task 'x' in"):
            served.run(torch.zeros(1, 3, 48, 48), "x")
    with pytest.raises(PearStoreError, match="no store there"):
        Router(backbone, tmp_path / "nowhere")


def test_from_a_store_versions_and_refresh(backbone: Backbone, task_maker: Maker, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 48, 48)
    with Store.create(tmp_path / "s") as store:
        store.add(task_maker("t", seed=1))
        router = Router(backbone, tmp_path / "s")
        first = whole(router.run(images, "t"))
        store.add(task_maker("t", seed=2))
        torch.testing.assert_close(router.run(images, "t").logits, first)
        both = whole(router.run(torch.cat([images, images]), ["t@1", "t@1", "t@2", "t@2"]))
        torch.testing.assert_close(both[:2], first, atol=1e-5, rtol=1e-5)
        router.refresh()
        torch.testing.assert_close(router.run(images, "t").logits, both[2:], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(both[2:], first, atol=1e-2)


def test_after_gc_the_others_are_bit_identical(backbone: Backbone, task_maker: Maker, tmp_path: Path) -> None:
    images = torch.randn(3, 3, 48, 48)
    with Store.create(tmp_path / "s") as store:
        for i, name in enumerate("xyz"):
            store.add(task_maker(name, seed=i))
        before = whole(Router(backbone, store).run(images, ["x", "y", "x"]))
        store.remove("z")
        assert store.gc(repack_all=True).removed_tensors == 8
        after = whole(Router(backbone, Store(tmp_path / "s")).run(images, ["x", "y", "x"]))
        assert torch.equal(before, after)


def test_slots_hold_shared_tensors_once(backbone: Backbone, tasks: dict[str, Task]) -> None:
    router = Router(backbone)
    router.add(tasks["a"])
    router.add(tasks["d"])  # all of a's adapters, another head
    images = torch.zeros(1, 3, 48, 48)
    router.run(images, "a")
    alone = router._slots.used_bytes
    router.run(images, "d")
    assert router._slots.used_bytes - alone == 4 * (4 * 192 + 4)


def test_slots_evict_the_least_recently_used_within_the_budget(backbone: Backbone, task_maker: Maker) -> None:
    images = torch.randn(1, 3, 48, 48)
    probe = Router(backbone)
    made = {name: task_maker(name, seed=i) for i, name in enumerate("pqrs")}
    probe.add(made["p"])
    probe.run(images, "p")
    size = probe._slots.used_bytes
    router = Router(backbone, slot_bytes=2 * size + 10)
    for task in made.values():
        router.add(task)
    expected = {name: whole(router.run(images, name)) for name in made}
    for name in "pqpsrqps":
        torch.testing.assert_close(router.run(images, name).logits, expected[name], atol=1e-5, rtol=1e-5)
        assert router._slots.used_bytes <= 2 * size + 10
    pair = router.run(images.repeat(2, 1, 1, 1), ["p", "s"]).logits
    torch.testing.assert_close(pair, torch.cat([expected["p"], expected["s"]]), atol=1e-5, rtol=1e-5)
    with pytest.raises(SlotBudgetError, match=r"need [\d,]+ bytes of slots, slot_bytes is"):
        router.run(images.repeat(3, 1, 1, 1), ["p", "q", "s"])
    torch.testing.assert_close(router.run(images, "q").logits, expected["q"], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_low_precision_is_near(
    router: Router, backbone: Backbone, tasks: dict[str, Task], dtype: torch.dtype, share: float
) -> None:
    low = Router(backbone, dtype=dtype)
    images = torch.randn(4, 3, 48, 48)
    for task in tasks.values():
        low.add(task)
    for found, exact in zip(low.run(images, list("abcd")).logits, router.run(images, list("abcd")).logits, strict=True):
        assert (found - exact).abs().max() < share * exact.abs().max() + 2 * share


def test_scales_apply_before_the_cast(backbone: Backbone, task_maker: Maker) -> None:
    """A scale that bfloat16 cannot hold, on values that it can: only the product is rounded."""
    task = task_maker("t", positions=("blocks.0.attn",))
    scaled = Task({**task.record, "positions": {"blocks.0.attn": [["a0", 1 + 2**-10]]}}, task.tensors)
    router = Router(backbone, dtype=torch.bfloat16)
    router.add(scaled)
    use = router._find("t").use
    router._slots.load(use, router._registry.tensors(use))
    loaded = router._slots.find([use])
    assert loaded is not None
    up = router._slots.matrices.gather(loaded, {"blocks.0.attn": np.array([0])}).weights["blocks.0.attn"].up
    exact = torch.tensor(up_values(task.adapters["a0"], task.tensors))
    assert torch.equal(up, (exact * (1 + 2**-10)).bfloat16())
    assert not torch.equal(up, exact.bfloat16() * (1 + 2**-10))


@pytest.mark.slow
def test_threads_get_old_or_new_versions_never_a_mixture(backbone: Backbone, task_maker: Maker, tmp_path: Path) -> None:
    """8 threads run single, mixed and all, while versions change, slots are short, and tasks are loaded ahead."""
    images = torch.randn(2, 3, 48, 48)
    with Store.create(tmp_path / "s") as store:
        versions = [task_maker("t", seed=i) for i in range(3)]
        fixed = {f"f{i}": task_maker(f"f{i}", seed=10 + i) for i in range(3)}
        right: dict[str, list[torch.Tensor]] = {}
        for task in (*versions, *fixed.values()):
            with Router(backbone) as lone:
                lone.add(task)
                right.setdefault(task.name, []).append(whole(lone.run(images, task.name)))
        for task in (versions[0], *fixed.values()):
            store.add(task)
        with Router(backbone) as probe:
            probe.add(versions[0])
            probe.run(images, "t")
            size = probe.stats().size_bytes
        router = Router(backbone, store, slot_bytes=int(2.5 * size))
        wrong: list[str] = []
        calls = [0]
        stop = threading.Event()

        def judge(name: str, row: int, got: torch.Tensor) -> None:
            calls[0] += 1
            if not any(torch.allclose(got, one[row], atol=1e-4) for one in right[name]):
                wrong.append(name)

        def ask(number: int) -> None:
            other = f"f{number % 3}"
            while not stop.is_set():
                try:
                    if number % 3 == 0:
                        router.preload(other)
                    for row, got in enumerate(router.run(images, ["t", other]).logits):
                        judge(("t", other)[row], row, got)
                    for name, found in router.run_all(images, ["t", other, f"f{(number + 1) % 3}"]).items():
                        for row, got in enumerate(found.logits):
                            judge(name, row, got)
                except Exception as error:
                    wrong.append(repr(error))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for i in range(12):
            store.add(versions[i % 3])
            router.refresh()
            before = calls[0]
            while calls[0] < before + 16 and not wrong:
                time.sleep(0.001)
        stop.set()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert router.stats().evictions > 0
        assert router.stats().size_bytes <= 2.5 * size


def test_a_removed_version_is_served_until_refresh(backbone: Backbone, task_maker: Maker, store: Store) -> None:
    images = torch.randn(1, 3, 48, 48)
    store.add(task_maker("t", seed=1))
    store.add(task_maker("t", seed=2))
    router = Router(backbone, store)
    first = whole(router.run(images, "t@1"))
    store.remove("t@1")
    store.gc(repack_all=True)
    assert torch.equal(whole(router.run(images, "t@1")), first)
    router.refresh()
    with pytest.raises(UnknownTaskError, match="no version 1 of task 't'"):
        router.run(images, "t@1")


@pytest.mark.parametrize("form", ["path", "object", "expanded"])
def test_one_image_for_several_tasks_is_decoded_and_run_once(
    backbone: Backbone, task_maker: Maker, tmp_path: Path, form: str
) -> None:
    router = Router(backbone)
    for i, name in enumerate("ab"):
        router.add(task_maker(name, seed=i))
    array = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    given: Any = {
        "path": [tmp_path / "x.png", str(tmp_path / "x.png")],
        "object": [array, array],
        "expanded": torch.randn(1, 3, 48, 48).expand(2, -1, -1, -1),
    }[form]
    rows: list[int] = []
    module = router._adapted._module((48, 48))
    for part in map(module.get_submodule, ("patch_embed", "norm")):
        part.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out = router.run(given, ["a", "b"])
    assert rows == [1, 2]
    for row, name in enumerate("ab"):
        torch.testing.assert_close(out.logits[row], router.run(given[:1], name).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_many_rows_of_few_images_run_in_parts(backbone: Backbone, task_maker: Maker) -> None:
    router = Router(backbone)
    names = [f"t{i}" for i in range(5)]
    for i, name in enumerate(names):
        router.add(task_maker(name, seed=i))
    images = torch.randn(110, 3, 48, 48)
    rows: list[int] = []
    norm = router._adapted._module((48, 48)).get_submodule("norm")
    norm.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    out = router.run_all(images, names)
    assert rows == [510, 40]
    for name in names:
        torch.testing.assert_close(out[name].logits, router.run(images, name).logits, atol=1e-5, rtol=1e-5)
    assert router.run_all(images, []) == {}


def test_a_checkpoint_file_can_be_added(backbone: Backbone, task_maker: Maker, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "t.safetensors", task_maker("t"))
    router = Router(backbone)
    assert router.add(tmp_path / "t.safetensors") == "t"
    assert len(router.run(torch.zeros(1, 3, 48, 48), "t")) == 1


def test_a_core_is_a_matrix_between_down_and_up(backbone: Backbone, task_maker: Callable[..., Task]) -> None:
    """A borrowed adapter with a core, and a head of codes, give what the multiplied-out task gives."""
    plain = task_maker("plain")
    down, up, core = (torch.randn(*shape) / 8 for shape in ((192, 4), (4, 192), (4, 4)))
    codes, scale = quantise(to_torch(plain.tensors["head.weight"]), 8, 0)
    found = {
        "d": from_torch(down), "u": from_torch(up), "c": from_torch(core), "w": from_torch(codes),
        "s": from_torch(scale),
        "b": plain.tensors["head.bias"],
    }  # fmt: skip
    cored = make_task({
        **plain.record, "task": "cored",
        "adapters": {"a": {"down": "d", "up": "u"}, "c": {"down": "d", "up": "c", "basis": "u"}},
        "positions": {"blocks.1.mlp": [["a", 0.5]], "blocks.3.attn": [["c", 2.0], ["a", 1.0]]},
        "head": {"weight": "w", "bias": "b", "quant": {"bits": 8, "weight": {"shape": [3, 192], "scale": "s"}}},
    }, found)  # fmt: skip
    weight = dequantise(codes, scale, (3, 192), 8, 0)
    out = {
        "d": from_torch(down),
        "u": from_torch(up),
        "cu": from_torch(core @ up),
        "w": from_torch(weight),
        "b": found["b"],
    }
    multiplied = make_task({
        **plain.record, "task": "multiplied",
        "adapters": {"a": {"down": "d", "up": "u"}, "c": {"down": "d", "up": "cu"}},
        "positions": cored.record["positions"], "head": {"weight": "w", "bias": "b"},
    }, out)  # fmt: skip
    router = Router(backbone)
    for task in (plain, cored, multiplied):
        router.add(task)
    images = torch.randn(4, 3, 48, 48)
    expected = router.run(images, "multiplied").logits
    torch.testing.assert_close(router.run(images, "cored").logits, expected, atol=1e-5, rtol=1e-5)
    mixed = router.run(images, ["cored", "plain", "cored", "multiplied"]).logits
    torch.testing.assert_close(mixed[::2], expected[::2], atol=1e-5, rtol=1e-5)


def test_a_row_without_finite_numbers_has_no_label_and_says_so(
    backbone: Backbone, task_maker: Maker, tasks: dict[str, Task]
) -> None:
    router = Router(backbone)
    for task in tasks.values():
        router.add(task)
    images = torch.randn(4, 3, 48, 48)
    right = router.run(images, list("abca"))
    images[1, 0, 3, 3] = torch.nan
    found = router.run(images, list("abca"))
    assert found.finite == [True, False, True, True]
    assert found.labels == [right.labels[0], None, *right.labels[2:]]
    assert [error is None for error in found.errors] == found.finite
    assert "task 'b' gives NaN or infinity for this image" in str(found.errors[1])
    assert found.topk(2)[1] == []
    assert [[label for label, _ in row] for row in found.topk(2)[2:]] == [
        [label for label, _ in row] for row in right.topk(2)[2:]
    ]
    same = router.run(images, "a")
    assert same.finite == [True, False, True, True]
    assert same.labels[1] is None


def test_a_task_that_overflows_float16_has_no_label(backbone: Backbone, task_maker: Maker) -> None:
    plain = task_maker("t", positions=("blocks.0.attn",))
    huge = make_task({**plain.record, "positions": {"blocks.0.attn": [["a0", 1e29]]}}, plain.tensors)
    router = Router(backbone, dtype=torch.float16)
    router.add(huge)
    router.add(task_maker("good"))
    found = router.run(torch.randn(2, 3, 48, 48), ["t", "good"])
    assert found.finite == [False, True]
    assert found.labels[0] is None
    assert found.labels[1] is not None


@pytest.mark.parametrize("k", [0, -1])
def test_topk_of_less_than_one(router: Router, k: int) -> None:
    with pytest.raises(RouterError, match=f"k {k}: expected at least 1"):
        router.run(torch.zeros(1, 3, 48, 48), "a").topk(k)
    assert router.run(torch.zeros(1, 3, 48, 48), "f").topk(3) == [[]]
    assert router.run(torch.zeros(1, 3, 48, 48), "f").errors == [None]


BAD_TASKS: dict[str, tuple[Callable[[Task], Task], str]] = {
    "nan": (
        lambda t: Task(t.record, {**t.tensors, "a0.down": floats(np.full((192, 4), np.nan))}),
        "tensor .* holds NaN or infinity",
    ),
    "infinite bias": (
        lambda t: Task(t.record, {**t.tensors, "head.bias": floats(np.array([0, np.inf, 0]))}),
        "tensor .* holds NaN or infinity",
    ),
    "activation": (lambda t: Task({**t.record, "activation": "tanh"}, t.tensors), "'activation': expected one of"),
    "labels": (lambda t: Task({**t.record, "labels": ["a", "b"]}, t.tensors), "2 labels, the head has 3 rows"),
    "threshold": (
        lambda t: Task({**t.record, "threshold": 1.5}, t.tensors),
        "field 'threshold': expected a number from 0 to 1, found 1.5",
    ),
    "record": (lambda t: Task({"task": "t"}, t.tensors), "field 'format': expected 'pear-task/1'"),
    "bytes": (
        lambda t: Task(t.record, {**t.tensors, "head.bias": RawTensor("F32", (3,), b"")}),
        "tensor 'head.bias': expected 12 bytes for its shape, found 0",
    ),
}


@pytest.mark.parametrize("kind", BAD_TASKS)
def test_tasks_that_could_only_give_nonsense_are_refused(backbone: Backbone, task_maker: Maker, kind: str) -> None:
    spoil, message = BAD_TASKS[kind]
    router = Router(backbone)
    with pytest.raises((RouterError, PearStoreError), match=message):
        router.add(spoil(task_maker("t")))
    with pytest.raises(UnknownTaskError):
        router.check("t")


@pytest.mark.parametrize("kind", ["nan", "infinite bias", "activation", "labels", "threshold"])
def test_nor_are_they_taken_from_a_store_that_somebody_made(
    backbone: Backbone, task_maker: Maker, store: Store, kind: str
) -> None:
    store.add(task_maker("t"))
    spoil, message = BAD_TASKS[kind]

    class Spoilt:
        resolve = store.resolve

        def get(self, reference: str, copy: bool = True) -> Task:
            return spoil(task_maker("t"))

    spoilt: Any = Spoilt()
    router = Router(backbone, spoilt)
    with pytest.raises(TaskError, match=f"task 't': .*{message}"):
        router.run(torch.zeros(1, 3, 48, 48), "t")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_backbone_with_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    module: Any = timm.create_model("pear_tiny")
    with torch.no_grad():
        module.blocks[3].mlp.fc1.bias[7] = value
    message = "backbone pear_tiny: tensor 'blocks.3.mlp.fc1.bias' holds NaN or infinity"
    with pytest.raises(BackboneError, match=message):
        Router(module)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=message):
        Router("pear_tiny", weights=tmp_path / "w.safetensors")


def test_long_lists_run_in_parts(
    backbone: Backbone, task_maker: Maker, monkeypatch: pytest.MonkeyPatch, router: Router
) -> None:
    """At most so many pictures are decoded and run at once; each is decoded once, in its own order."""
    monkeypatch.setattr("router.batches.PIXELS", 8 * 48 * 48)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (48, 48, 3), dtype=np.uint8) for _ in range(21)]
    names = [list("abcd")[i % 4] for i in range(21)]
    decoded: list[int] = []
    rows: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def counted(given: Any, ways: Any) -> Any:
        decoded.append(len(given))
        held.append(sum(pixels() is not None for pixels in made))
        found = preprocess_module.decode(given, ways)
        made.extend(weakref.ref(pixels) for pixels in found if isinstance(pixels, torch.Tensor))
        return found

    monkeypatch.setattr("router.batches.decode", counted)
    router._adapted._module((48, 48)).get_submodule("norm").register_forward_pre_hook(
        lambda _, args: rows.append(len(args[0]))
    )
    found = router.run(pictures, names)
    assert decoded == rows == [8, 8, 5]
    assert len(made) == 21 and max(held) <= 8, "pixels of parts that have run are not kept"
    for i in (0, 7, 8, 20):
        torch.testing.assert_close(found.logits[i], router.run(pictures[i : i + 1], names[i]).logits[0])
    del rows[:]
    router.run(torch.zeros(21, 3, 48, 48), "a")
    assert rows == [8, 8, 5]


def test_run_all_in_parts_decodes_each_picture_once(
    backbone: Backbone, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list("abcd")
    with Router(backbone) as roomy:
        for name in names:
            roomy.add(tasks[name])
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 255, (48, 48, 3), dtype=np.uint8) for _ in range(5)]
        right = roomy.run_all(pictures, names)
        size = roomy.stats().size_bytes
    router = Router(backbone, slot_bytes=size * 2 // 3)
    for name in names:
        router.add(tasks[name])
    decoded: list[int] = []
    decode_one = preprocess_module._decode_one

    def counted(asked: Any, **options: Any) -> Any:
        decoded.append(1)
        return decode_one(asked, **options)

    monkeypatch.setattr(preprocess_module, "_decode_one", counted)
    found = router.run_all(pictures, names)
    assert len(decoded) == 5
    assert router.stats().evictions > 0
    assert list(found) == names
    for name in names:
        torch.testing.assert_close(found[name].logits, right[name].logits, atol=1e-5, rtol=1e-5)
