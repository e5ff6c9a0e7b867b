"""The router on a GPU: it answers as on the CPU, in every precision and mode, and gives its memory back."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pear_store import Store, Task
from router import Backbone, JpegDecoder, Router
from router.pictures import PlainJpeg
from tests.helpers.jpegs import photograph
from tests.helpers.lists import read, run
from tests.helpers.predictions import whole

Maker = Callable[..., Task]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")]
NAMES = ["a", "b", "c", "b", "a", "d", "c", "c"]
RTOL = {torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
"""Of the largest logit."""
LINEARS = ("blocks.0.attn.qkv", "blocks.3.attn.proj")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 is float32: not TF32, which convolutions take by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(len(NAMES), 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tasks(task_maker: Maker) -> list[Task]:
    activations = {"a": "identity", "b": "gelu", "c": "relu", "d": "identity"}
    return [task_maker(name, seed=i, activation=act) for i, (name, act) in enumerate(activations.items())]


def agree(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return bool((found - expected).abs().max() <= RTOL[dtype] * expected.abs().max())


def router_of(backbone: Backbone, tasks: list[Task], **options: Any) -> Router:
    router = Router(backbone, **options)
    for task in tasks:
        router.add(task)
    return router


@pytest.mark.parametrize("dtype", RTOL, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_a_mixed_batch_answers_as_on_the_cpu(
    backbone: Backbone, tasks: list[Task], images: torch.Tensor, dtype: torch.dtype
) -> None:
    expected = whole(router_of(backbone, tasks).run(images, NAMES))
    router = router_of(backbone, tasks, device="cuda", dtype=dtype)
    for given in (images, images.to("cuda"), images.to("cuda", dtype)):
        found = whole(router.run(given, NAMES))
        assert found.device.type == "cpu" and found.dtype == torch.float32
        assert agree(found, expected, dtype)


@pytest.mark.parametrize("dtype", RTOL, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_shared_images_and_single_tasks_answer_as_a_mixed_batch(
    backbone: Backbone, tasks: list[Task], images: torch.Tensor, dtype: torch.dtype
) -> None:
    router = router_of(backbone, tasks, device="cuda", dtype=dtype, merge=False)
    mixed = whole(router.run(images, NAMES))
    together = router.run_all(images, ["a", "b", "c", "d"])
    for name in ("a", "b", "c", "d"):
        alone = whole(router.run(images, name))
        assert agree(whole(together[name]), alone, dtype)
        rows = [i for i, one in enumerate(NAMES) if one == name]
        assert agree(mixed[rows], alone[rows], dtype)


def test_a_merged_task_answers_as_unmerged(backbone: Backbone, task_maker: Maker, images: torch.Tensor) -> None:
    task = task_maker("m", positions=LINEARS)
    task = Task(
        {**task.record, "positions": {p: b for p, b in task.record["positions"].items() if p in LINEARS}}, task.tensors
    )
    merged = router_of(backbone, [task], device="cuda", merge=True).run(images, "m")
    plain = router_of(backbone, [task], device="cuda", merge=False).run(images, "m")
    assert agree(whole(merged), whole(plain))


@pytest.mark.parametrize("dtype", RTOL, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_recorded_batches_answer_as_eager_ones_whatever_their_mix(
    backbone: Backbone, tasks: list[Task], images: torch.Tensor, task_maker: Maker, dtype: torch.dtype
) -> None:
    recorded = router_of(backbone, tasks, device="cuda", dtype=dtype, merge=False, graphs=True)
    eager = router_of(backbone, tasks, device="cuda", dtype=dtype, merge=False)
    for router in (recorded, eager):
        router.preload(list("abcd")).result()
    graphs = recorded._engine._graphs
    assert graphs is not None and eager._engine._graphs is None

    def check(names: list[str], order: list[int]) -> None:
        given = images[order]
        assert agree(whole(recorded.run(given, names)), whole(eager.run(given, names)), dtype), names

    mixes = [NAMES, list("aaaaaaaa"), list("dcbadcba"), list("abcda"), list("dddd"), list("ab"), ["c"], ["b"]]
    for _ in range(3):
        for i, names in enumerate(mixes):
            check(names, [(j * 3 + i) % 8 for j in range(len(names))])
    assert graphs.refused is None
    assert len(graphs) == 4, "a graph for 8, 4, 2 and 1 rows"
    for router in (recorded, eager):
        router.add(task_maker("wide", seed=9, rank=20, positions=("blocks.1.mlp",)))  # another form of batch
    for _ in range(3):
        check(["wide", "a", "wide", "b"], [0, 1, 2, 3])
        check(["a", "b", "c", "d"], [4, 5, 6, 7])
    assert len(graphs) == 1, "what was recorded for the narrower form is gone"


def test_recorded_batches_of_several_threads_and_streams_do_not_mix(
    backbone: Backbone, tasks: list[Task], images: torch.Tensor
) -> None:
    router = router_of(backbone, tasks, device="cuda", merge=False, graphs=True)
    eager = router_of(backbone, tasks, device="cuda", merge=False)
    right = {name: whole(eager.run(images, name)) for name in "abcd"}

    def ask(i: int) -> bool:
        name = "abcd"[i % 4]
        if i % 3:
            return agree(whole(router.run(images, name)), right[name])
        with torch.cuda.stream(torch.cuda.Stream()):
            return agree(whole(router.run(images, name)), right[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_a_backbone_that_cannot_be_recorded_runs_eagerly(
    backbone: Backbone, tasks: list[Task], images: torch.Tensor
) -> None:
    router = router_of(backbone, tasks, device="cuda", merge=False, graphs=True)
    right = whole(router.run(images, NAMES))
    norm = router._adapted._module((48, 48)).get_submodule("norm")
    norm.register_forward_hook(lambda _, __, y: y + 0 * float(y.sum()))  # which waits for the GPU
    for _ in range(4):
        assert agree(whole(router.run(images, NAMES)), right)
    graphs = router._engine._graphs
    assert graphs is not None and graphs.refused and len(graphs) == 0


def test_tasks_of_a_store_take_turns_in_few_slots(
    backbone: Backbone, task_maker: Maker, store: Store, images: torch.Tensor
) -> None:
    """Copies from pinned memory are awaited before the memory is used again."""
    names = [f"t{i}" for i in range(24)]
    made = {name: task_maker(name, seed=i) for i, name in enumerate(names)}
    for task in made.values():
        store.add(task)
    cpu = router_of(backbone, list(made.values()))
    expected = {name: whole(cpu.run(images[:2], name)) for name in names}
    with Router(backbone, store, device="cuda") as probe:
        probe.run(images[:1], names[0])
        size = probe.stats().size_bytes
    with Router(backbone, store, device="cuda", slot_bytes=5 * size, merge=False) as router:
        for _ in range(3):
            for i in range(len(names)):
                pair = [names[i], names[(7 * i + 1) % len(names)]]
                found = whole(router.run(images[:2], pair))
                for row, name in enumerate(pair):
                    assert agree(found[row], expected[name][row])
        assert router.stats().evictions > 0


def test_threads_share_a_gpu(backbone: Backbone, tasks: list[Task], images: torch.Tensor) -> None:
    router = router_of(backbone, tasks, device="cuda", merge=False)
    expected = {name: whole(router.run(images, name)) for name in "abcd"}

    def ask(i: int) -> bool:
        name = "abcd"[i % 4]
        return agree(whole(router.run(images, name)), expected[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(64)))


def test_closing_gives_the_memory_back(backbone: Backbone, tasks: list[Task], images: torch.Tensor) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    router = router_of(backbone, tasks, device="cuda")
    router.run(images, NAMES)
    assert torch.cuda.memory_allocated() > before
    router.close()
    del router
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_pictures_of_files_reach_the_gpu(backbone: Backbone, tasks: list[Task], tmp_path: Path) -> None:
    from PIL import Image

    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        pixels = torch.randint(0, 256, (60, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(paths[-1])
    expected = whole(router_of(backbone, tasks).run(paths, ["a", "b", "c"]))
    found = whole(router_of(backbone, tasks, device="cuda").run(paths, ["a", "b", "c"]))
    assert agree(found, expected)


def test_auto_is_bfloat16_where_the_gpu_has_it(backbone: Backbone) -> None:
    router = Router(backbone, device="cuda", dtype="auto")
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    assert router._adapted.dtype == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_decoding_writes_into_no_memory_that_queued_work_still_reads() -> None:
    """NVJPEG's hardware does not wait for its stream, so the decoder has a stream and memory of its own."""
    decoder, file = JpegDecoder("cuda"), photograph(640, 480)
    jpegs = [PlainJpeg("", file, (480, 640), None)] * 4
    for _ in range(20):
        read = [torch.full((3 * 480 * 640 // 4,), float(i), device="cuda") for i in range(4)]
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        sums = [one.sum() for one in read]
        del read
        assert None not in decoder.decode(jpegs, lambda _, pixels: {"mean": pixels.float().mean()})
        assert [float(one) for one in sums] == [i * 3 * 480 * 640 // 4 for i in range(4)]


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_pear_infer_decodes_on_the_gpu(task_maker: Maker, tmp_path: Path) -> None:
    plain = task_maker("a", seed=1)
    with Store.create(tmp_path / "s") as store:
        store.add(Task({**plain.record, "preprocess": {**plain.record["preprocess"], "reading": 2}}, plain.tensors))
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(photograph(200 + i, 150))
    common = ("--store", tmp_path / "s", "--task", "a", "--device", "cuda")
    done = run(tmp_path / "pictures", tmp_path / "gpu.csv", *common, "--decode", "gpu")
    assert done.exit_code == 0 and "(3 images on the GPU)" in done.stderr, done.stderr
    assert run(tmp_path / "pictures", tmp_path / "cpu.csv", *common).exit_code == 0
    for one, other in zip(read(tmp_path / "gpu.csv"), read(tmp_path / "cpu.csv"), strict=True):
        assert abs(float(one["probability"]) - float(other["probability"])) < 0.05
