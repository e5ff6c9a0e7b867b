"""Shared fixtures."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before anything imports ours

from pear_store import RawTensor, Store, Task, make_task
from router import Backbone, load_backbone
from tests.helpers.log import keep_log
from tests.helpers.makers import floats, record

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start hears Ctrl-C

SHARED = Path(__file__).parents[2] / "shared"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The log of `make faults` says how each of its parts ended."""
    counts = {kind: len(terminalreporter.getreports(kind)) for kind in ("passed", "failed", "error", "skipped")}
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    keep_log(f"pytest {' '.join(config.invocation_params.args)}: {found}")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "store") as made:
        yield made


@pytest.fixture
def mask() -> Iterator[int]:
    """The user's umask, of which new files get their mode: not the usual one."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the system give so many threads more."""
    start = threading.Thread.start

    def give(most: int) -> None:
        left = [None] * most

        def start_or_fail(thread: threading.Thread) -> None:
            if not left:
                raise RuntimeError("can't start new thread")
            left.pop()
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_fail)

    return give


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("pear_tiny")


@pytest.fixture
def backbone_is_loaded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command would load it anew, which takes as long as all else that most tests of commands do."""

    def load(name: str, weights: str | None) -> Backbone:
        return backbone if (name, weights) == ("pear_tiny", None) else load_backbone(name, weights)

    monkeypatch.setattr("router.router.load_backbone", load)


@pytest.fixture(scope="session")
def task_maker(backbone: Backbone) -> Callable[..., Task]:
    """Makes random tasks for the embedded backbone."""

    def make(
        name: str,
        seed: int = 0,
        rank: int = 4,
        classes: int = 3,
        activation: str = "identity",
        positions: tuple[str, ...] = ("blocks.0.attn", "blocks.2.mlp", "blocks.4.attn.qkv"),
        size: int = 48,
        headless: bool = False,
    ) -> Task:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> RawTensor:
            return floats(torch.randn(*shape, generator=generator).numpy() / shape[0] ** 0.5)

        found: dict[str, RawTensor] = {}
        adapters, branches = {}, {}
        for i, position in enumerate(positions):
            d_out = 576 if position.endswith("qkv") else 192
            found[f"a{i}.down"], found[f"a{i}.up"] = random(192, rank), random(rank, d_out)
            adapters[f"a{i}"] = {"down": f"a{i}.down", "up": f"a{i}.up"}
            branches[position] = [[f"a{i}", 0.5 + 0.25 * i]]
        branches["blocks.5.attn"] = [["a0", 0.3], ["a0", -0.2]]  # shared, and two branches at once
        if not headless:
            found["head.weight"], found["head.bias"] = random(classes, 192), random(classes)
        made = record(
            name,
            backbone={"model": backbone.name, "digest": backbone.digest},
            activation=activation,
            adapters=adapters,
            positions=branches,
            labels=[] if headless else [f"{name}-{i}" for i in range(classes)],
        )
        made["preprocess"] = {**made["preprocess"], "input_size": [3, size, size]}
        if headless:
            made["head"] = None
        return make_task(made, found)

    return make


settings.register_profile("commit", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("commit")
