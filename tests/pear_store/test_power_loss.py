"""Power is lost: on a real ext4 whose image is copied under load, and in a model that drops what nothing had synced."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pear_store import Store, rebuild, verify
from tests.helpers.log import keep_log
from tests.helpers.makers import small_task
from tests.helpers.power import CALLS, Replay
from tests.pear_store.test_store import contents

pytestmark = pytest.mark.slow

LOSSES = int(os.environ.get("PEAR_POWER_LOSSES", "24"))
"""Simulated losses of power."""
CUTS = int(os.environ.get("PEAR_POWER_CUTS", "1"))
"""Losses of power on a real ext4."""
ROOT = Path(__file__).parents[2]
MKFS = ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0")  # else the kernel writes on by itself

STORE = Path("one/two/store")

State = dict[str, Any]


def _command(call: str) -> list[str]:
    return [sys.executable, "-c", f"from tests.helpers.workers import *; {call}"]


def state_of(path: Path) -> State:
    """All that a store holds, in the words of `change_and_say`; every tensor is read."""
    found: State = {"versions": {}, "tags": {}}
    with Store(path) as store:
        for version in store.versions():
            reference = f"{version.task}@{version.version}"
            found["versions"][reference] = contents(store.get(reference))
            for tag in version.tags:
                found["tags"].setdefault(version.task, {})[tag] = version.version
    return found


def _with_contents(state: State) -> State:
    made = {name: contents(small_task(name.partition("@")[0], seed=seed)) for name, seed in state["versions"].items()}
    return {"versions": made, "tags": state["tags"]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An empty directory, and the trace of what `change_and_say` did in it to a store at STORE."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    folder = tmp_path_factory.mktemp("power")
    root, trace = folder / "disk", folder / "trace"
    root.mkdir()
    call = _command(f"change_and_say({str(root / STORE)!r}, 1)")
    options = ["-f", "-y", "-xx", "-s", str(1 << 24), "-e", f"trace={CALLS}", "-o", str(trace)]
    ended = subprocess.run(["strace", *options, *call], capture_output=True, text=True, cwd=ROOT, timeout=300)
    if ended.returncode and "ptrace" in ended.stderr.lower():
        pytest.skip("strace may not trace here")
    assert ended.returncode == 0, ended.stderr
    final = state_of(root / STORE)
    shutil.rmtree(root)
    root.mkdir()
    replay = Replay(root, trace)
    count = sum(1 for _ in replay.steps())
    replay.disk.sync_all()
    replay.disk.lose_power(random.Random(0), folder / "after")
    assert state_of(folder / "after" / STORE) == final == _with_contents(json.loads(replay.said[-1])[1])
    keep_log(f"power loss, recorded: {count} calls that change the disk, 24 changes of a store")
    return root, trace


def test_power_loss_at_any_call_loses_nothing_acknowledged(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    root, trace = recorded
    count = sum(1 for _ in Replay(root, trace).steps())
    rng = random.Random(7)
    moments = sorted(rng.randrange(count) for _ in range(LOSSES))
    replay = Replay(root, trace)
    disk, rebuilt = tmp_path / "lost", tmp_path / "rebuilt"
    lost = disk / STORE
    for step, name in enumerate(replay.steps()):
        while moments and moments[0] == step:
            moments.pop(0)
            said = [json.loads(line) for line in replay.said]
            if not said:  # the store is being made
                replay.disk.lose_power(rng, disk)
                with Store.create(lost) as store:
                    store.add(small_task("first"))
                shutil.rmtree(disk)
                continue
            done = next(state for word, state in reversed(said) if word == "done")
            allowed = [_with_contents(done), _with_contents(said[-1][1])]
            replay.disk.lose_power(rng, disk)
            where = f"step {step}, {name}, after {said[-1]}"
            shutil.copytree(lost, rebuilt)
            assert state_of(lost) in allowed, where
            report = verify(lost)
            if report.unknown_packs:  # its name in tmp/, which nothing syncs, is lost: nobody can tell that it was not
                rebuild(lost)  # committed, so gc asks for a rebuild
                report = verify(lost)
                assert state_of(lost) in allowed, where
            assert report.ok, where
            shutil.rmtree(rebuilt / "index", ignore_errors=True)
            rebuild(rebuilt)
            assert state_of(rebuilt) in allowed, f"rebuilt: {where}"
            shutil.rmtree(rebuilt)
            with Store(lost) as store:  # and it works on
                store.add(small_task("after", seed=99))
                store.gc(repack_all=True)
            shutil.rmtree(disk)
    keep_log(f"power loss, simulated: {LOSSES} losses at {count} calls, nothing acknowledged was lost")


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A mounted ext4, and the file that is its disk."""
    image, mounted = tmp_path / "disk.img", tmp_path / "mounted"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(96 << 20)
    if shutil.which("mkfs.ext4") is None or subprocess.run([*MKFS, image]).returncode:
        pytest.skip("needs mkfs.ext4")
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True).returncode:
        pytest.skip("needs the right to mount a loop device")
    try:
        yield mounted, image
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def _writes_of(mounted: Path) -> list[str]:
    """The block device's counts of writes done and under way."""
    device = os.stat(mounted).st_dev
    fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return [fields[4], fields[6], fields[8]]


def test_power_cuts_on_ext4_lose_nothing_acknowledged(ext4: tuple[Path, Path], tmp_path: Path) -> None:
    """The disk is copied while a store is written to, as it is at that moment; the copy is mounted as after a cut."""
    mounted, image = ext4
    rng = random.Random(3)
    copied, again, output = tmp_path / "copy.img", tmp_path / "again", tmp_path / "output"
    again.mkdir()
    kept = 0
    for cut in range(CUTS):
        path = mounted / f"s{cut}"
        with open(output, "wb") as said:
            process = subprocess.Popen(_command(f"change_and_say({str(path)!r}, {cut})"), stdout=said, cwd=ROOT)
        while not output.stat().st_size:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        for tries in range(300):  # until no write came meanwhile: then the copy is the disk at one moment
            process.send_signal(signal.SIGSTOP)
            before, said_before = _writes_of(mounted), output.read_text()
            shutil.copyfile(image, copied)
            if before == _writes_of(mounted) and before[2] == "0":
                break
            if tries < 50:  # from then on it stays stopped: soon the system has written all that it will
                process.send_signal(signal.SIGCONT)
            time.sleep(0.02 if tries < 50 else 0.2)
        else:
            process.kill()
            process.wait()
            pytest.fail("the disk was never still")
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(["mount", "-o", "loop", copied, again], check=True)
        try:
            lines = [json.loads(line) for line in said_before.splitlines()]
            done = next(state for word, state in reversed(lines) if word == "done")
            allowed = [_with_contents(done), _with_contents(lines[-1][1])]
            assert state_of(again / f"s{cut}") in allowed, lines[-1]
            assert verify(again / f"s{cut}").ok
            shutil.rmtree(again / f"s{cut}" / "index")
            rebuild(again / f"s{cut}")
            assert state_of(again / f"s{cut}") in allowed, f"rebuilt: {lines[-1]}"
            kept += len(done["versions"])
        finally:
            subprocess.run(["umount", "-l", again], check=True)
        shutil.rmtree(path)
    keep_log(f"power loss on ext4: {CUTS} cuts, {kept} acknowledged versions, 0 lost")
