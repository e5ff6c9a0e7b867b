"""One graph for every mix, within a union of positions, a rank bucket and a bucket of batch sizes.

Run by test_compile.py in a process of its own: dynamo cannot trace the shape checks that the other tests switch on.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from pear_store import Task
from router import Backbone, BackboneError, Router
from tests.router.test_cores import on_bases

Maker = Callable[..., Task]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def test_after_a_warm_up_nothing_is_compiled(backbone: Backbone, task_maker: Maker) -> None:
    router = Router(backbone, compile="eager")
    for name, positions in (("a", ("blocks.0.attn",)), ("b", ("blocks.1.mlp",)), ("c", ("blocks.2.mlp",))):
        router.add(task_maker(name, positions=positions))
    router.warm_up(list("abc"), batch_sizes=[2, 8, 8])
    assert graphs() == 2, "one for each size, of the positions of all three"
    for names in ("ab", "cc", "abcabcab", "aaaaa", "bcbcbc"):
        router.run(torch.randn(len(names), 3, 48, 48), list(names))
    assert graphs() == 2
    router.run(torch.randn(4, 3, 48, 48), list("abca"))
    assert graphs() == 3, "a size that was not named"


def test_one_graph_serves_every_mix(backbone: Backbone, task_maker: Maker) -> None:
    made = [
        task_maker("a", seed=1, rank=4),
        task_maker("b", seed=2, rank=3, classes=5, activation="relu"),
        task_maker("c", seed=3, rank=4, positions=("blocks.1.mlp",)),
        task_maker("d", seed=4, headless=True),
        task_maker("late", seed=5, rank=2, positions=("blocks.0.attn", "blocks.1.mlp")),
    ]
    compiled, eager = Router(backbone, compile="eager"), Router(backbone, merge=False)
    for task in made:
        compiled.add(task)
        eager.add(task)
    compiled.preload(list("abcd")).result()
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def agree(names: list[str]) -> None:
        part = images[: len(names)]
        for row, expected in zip(compiled.run(part, names).logits, eager.run(part, names).logits, strict=True):
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)

    agree(list("abcdabcd"))
    assert graphs() == 1
    for mix in ("aaaaaaaa", "dddddddd", "abbbbbbb", "cccca", "abcdc", "ddddddd"):
        agree(list(mix))
    assert graphs() == 1, "another mix, or a batch of the same bucket, compiles nothing"
    agree(["late", "a", "late", "c", "b"])
    assert graphs() == 1, "nor does a task that is loaded later, within the union of positions and the rank bucket"
    agree(["a", "b"])
    assert graphs() == 2, "each bucket of batch sizes has its graph"
    compiled.add(task_maker("wide", seed=6, rank=5))
    eager.add(task_maker("wide", seed=6, rank=5))
    agree(["wide", *"abcdabc"])
    assert graphs() == 3, "a rank beyond the bucket makes another"


def test_one_graph_serves_every_mix_of_tasks_on_bases(backbone: Backbone, task_maker: Maker) -> None:
    made = [
        *(on_bases(name, seed) for seed, name in enumerate("abc")),
        on_bases("own", 4, own=2, activation="relu"),
        task_maker("plain", seed=5, rank=2, positions=("blocks.1.mlp",)),
        on_bases("other", 6, bases="v2", rank=(4, 5)),
    ]
    compiled, eager = Router(backbone, compile="eager"), Router(backbone, merge=False)
    for task in made:
        compiled.add(task)
        eager.add(task)
    compiled.preload([task.name for task in made]).result()
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def agree(names: list[str]) -> None:
        part = images[: len(names)]
        for row, expected in zip(compiled.run(part, names).logits, eager.run(part, names).logits, strict=True):
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)

    for mix in (
        ["a", "b", "c", "own"],
        ["a", "a", "a", "a"],
        ["plain", "own", "plain"],
        ["c", "plain", "a"],
        ["other"] * 3,
    ):
        agree(mix)
    assert graphs() == 1
    agree(["a", "other", "b", "own"])
    assert graphs() == 2, "two bases in one batch are wider: once"
    agree(["b", "a", "c", "other"])
    agree(["a", "plain", "b"])
    assert graphs() == 2


def test_more_buckets_than_torch_keeps_by_default(backbone: Backbone, task_maker: Maker) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        router = Router(backbone, compile="eager")
        router.add(task_maker("a"))
        for count in (1, 2):
            router.run(torch.zeros(count, 3, 48, 48), "a")
        assert graphs() == 2


def test_a_backbone_that_breaks_the_graph_is_refused(backbone: Backbone, task_maker: Maker) -> None:
    router = Router(backbone, compile="eager")
    router.add(task_maker("a"))
    module = router._adapted._module((48, 48))
    module.get_submodule("norm").register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(BackboneError, match="backbone pear_tiny does not compile into one graph: ") as caught:
        router.run(torch.zeros(2, 3, 48, 48), "a")
    assert "\n" not in str(caught.value)


def test_shared_images_run_eagerly(backbone: Backbone, task_maker: Maker) -> None:
    router, eager = Router(backbone, compile="eager"), Router(backbone)
    for one in (router, eager):
        for i, name in enumerate("ab"):
            one.add(task_maker(name, seed=i))
    images = torch.randn(3, 3, 48, 48)
    found, expected = router.run_all(images, ["a", "b"]), eager.run_all(images, ["a", "b"])
    for name in "ab":
        torch.testing.assert_close(found[name].logits, expected[name].logits, atol=1e-5, rtol=1e-5)
    assert graphs() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")
def test_compiled_on_a_gpu_answers_as_on_the_cpu(backbone: Backbone, task_maker: Maker) -> None:
    compiled, eager = Router(backbone, device="cuda", compile=True), Router(backbone)
    for router in (compiled, eager):
        for i, name in enumerate("abc"):
            router.add(task_maker(name, seed=i, activation=("identity", "relu", "gelu")[i]))
    images = torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    for names in ("abcab", "ccc"):
        found, expected = (router.run(images[: len(names)], list(names)).logits for router in (compiled, eager))
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)  # convolutions take TF32
