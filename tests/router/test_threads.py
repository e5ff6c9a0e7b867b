"""Threads beside those that run forwards: torch's OpenMP starts no team of threads for them."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pear_store import Store, Task
from router import Backbone, ClosedError, Prediction, Router, preprocess
from router.infer.plan import ahead
from router.serve.batcher import Batcher
from router.threads import computing_alone, side_threads


def test_side_threads_compute_alone_and_no_other_does() -> None:
    before = torch.get_num_threads()
    with side_threads(2, "side") as pool:
        assert {pool.submit(torch.get_num_threads).result() for _ in range(4)} == {1}
    assert torch.get_num_threads() == before
    with computing_alone():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


CODE = """
import asyncio, os, sys, threading
import torch
from PIL import Image
from router import Router
from router.serve.batcher import Batcher

def others():  # threads that Python did not start
    return len(os.listdir("/proc/self/task")) - threading.active_count()

store, how = sys.argv[1:]
before = others()
with Router("pear_tiny", store) as router:
    router.preload(["a", "b"]).result()
    router.refresh()
    print(others() - before)
    picture = Image.new("RGB", (512, 512))
    if how == "serve":
        async def work():
            batcher = Batcher(router, workers=3)
            await asyncio.gather(*(batcher.predict(picture, task) for task in "abab"))
            left = others()
            await batcher.close()
            return left
        left = asyncio.run(work())
    else:
        router.run([picture] * 8, task="a")
        left = others()
    print(left - before - (torch.get_num_threads() - 1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["serve", "run"])
def test_only_the_thread_that_runs_forwards_has_a_team(
    tmp_path: Path, task_maker: Callable[..., Task], how: str
) -> None:
    """Making a router, loading tasks, taking up versions and decoding images start none."""
    with Store.create(tmp_path / "store") as store:
        list(store.add_many([task_maker("a", size=144), task_maker("b", seed=1, size=144)]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, store.path, how], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"}, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n0\n", "")


def test_images_are_decoded_and_tasks_loaded_where_there_is_no_thread_more(
    tmp_path: Path, backbone: Backbone, task_maker: Callable[..., Task], few_threads: Callable[[int], None]
) -> None:
    pictures = [Image.new("RGB", (60, 60), (shade, 0, 0)) for shade in (0, 90, 200)]
    with Store.create(tmp_path / "s") as store:
        list(store.add_many([task_maker("a"), task_maker("b", seed=1)]))
        with Router(backbone, store) as router:
            expected = [one.logits for one in router.run(pictures, "a")]
            preprocess._workers.cache_clear()
            few_threads(0)
            router.preload(["b"]).result()
            assert [one.logits.tolist() for one in router.run(pictures, "a")] == [one.tolist() for one in expected]
            assert list(ahead(iter(range(5)), 2)) == list(range(5))

            async def ask() -> list[Prediction]:
                batcher = Batcher(router)
                found = await asyncio.gather(*(batcher.predict(picture, "a") for picture in pictures))
                assert await batcher.close(10)
                return found

            for one, logits in zip(asyncio.run(ask()), expected, strict=True):
                torch.testing.assert_close(one.logits, logits, rtol=1e-5, atol=1e-5)
            preprocess._workers.cache_clear()
        with pytest.raises(ClosedError):
            router.preload(["a"])
