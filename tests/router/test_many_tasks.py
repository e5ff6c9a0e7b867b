"""Many tasks, added one by one: a router needs neither a descriptor nor much memory for each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TASKS = int(os.environ.get("PEAR_MANY_TASKS", "300"))
WORK = """
import json, os, resource, sys
import numpy as np
import torch
from pear_store import RawTensor, Store, Task, make_task
from router import Router, load_backbone
from tests.helpers.makers import floats, record

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
path, count = sys.argv[1], int(sys.argv[2])
backbone = load_backbone("pear_tiny")
random = np.random.default_rng(0)

def task(i):
    values = {
        "a0.down": floats(random.normal(size=(192, 1))), "a0.up": floats(random.normal(size=(1, 192)) / 192),
        "head.weight": floats(np.zeros((2, 192))), "head.bias": floats(np.array([i, -i])),  # the logits say which it is
    }
    made = record(f"t{i}", backbone={"model": backbone.name, "digest": backbone.digest})
    return make_task({**made, "positions": {"blocks.5.attn": [["a0", 1.0]]}}, values)

def anonymous_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

with Store.create(path) as store:
    for i in range(count):
        store.add(task(i))
    packs = sum(1 for _ in store.path.glob("packs/*/*.safetensors"))
    with Router(backbone, store, slot_bytes=64 * 4000) as router:
        images = torch.zeros(16, 3, 48, 48)
        most_descriptors, first = 0, 0
        order = np.concatenate([random.permutation(count) for _ in range(2)])
        for start in range(0, len(order) - 15, 16):
            asked = order[start : start + 16]
            router.preload([f"t{i}" for i in order[start + 16 : start + 18]])
            logits = router.run(images, [f"t{i}" for i in asked]).logits
            assert torch.equal(logits[:, 0], torch.from_numpy(asked).float()), asked
            most_descriptors = max(most_descriptors, len(os.listdir("/proc/self/fd")))
            first = first or anonymous_bytes()
        for i in range(0, count, 7):
            router.check(f"t{i}")
        router.refresh()
        grown = anonymous_bytes() - first
print(json.dumps({"packs": packs, "descriptors": most_descriptors, "grown_bytes": grown}))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_tasks_added_one_by_one_need_no_descriptor_each(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORK, tmp_path / "s", str(TASKS)],
        capture_output=True, text=True, timeout=60 + TASKS * 0.5, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["packs"] == TASKS
    assert found["descriptors"] < 128
    assert found["grown_bytes"] < 300 * 2**20, found
