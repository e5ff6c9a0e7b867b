"""Threads beside those that run forwards: torch's OpenMP starts no team of threads for them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pear_store import Store, Task
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
