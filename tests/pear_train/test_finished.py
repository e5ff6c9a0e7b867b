"""What lies where a run is to write, and what is found wrong before anything is trained."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Ran
from PIL import Image

from pear_store import read_checkpoint
from pear_train import ConfigError, DivergedError, ResourceError, TrainConfig, open_dataset, train
from pear_train.cli import main
from pear_train.identity import differences, identity_of, run_identity
from pear_train.memory import memory_named, memory_of
from pear_train.output import check_out, is_finished, partial_path
from pear_train.plot import check_plot, plot_path
from pear_train.report import Step
from pear_train.run import TaskRun
from router import AdaptedBackbone, Backbone

FAST = ("--epochs", 2, "--rank", 2, "--positions", "blocks.[01].attn", "--ratio", 0.5, "--dtype", "float32")


def config(**changes: Any) -> TrainConfig:
    common = {"task": "t", "epochs": 2, "rank": 2, "positions": "blocks.[01].attn", "ratio": 0.5, "dtype": "float32"}
    return TrainConfig(**{**common, **changes})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of eight pictures each."""
    rng = np.random.default_rng(0)
    for name, light in (("dark", 60), ("light", 190)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(rng.normal(light, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def run(*args: object) -> Ran:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def interrupt(pictures: Path, backbone: Backbone, out: Path, **changes: Any) -> None:
    """Leaves the state of a run that was stopped after its first epoch."""

    def stop(step: Step) -> None:
        if step.epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config(**changes), backbone, open_dataset(str(pictures)), out, stop)


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_another_is_refused(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    command = ("t", "--data", pictures, "--out", out, *FAST)
    first = run(*command, "--json")
    assert first.exit_code == 0, first.stderr
    written, then = out.read_bytes(), out.stat().st_mtime_ns
    again = run(*command, "--json")
    assert again.exit_code == 0 and out.stat().st_mtime_ns == then
    assert "trained already, with the same options and data; --force trains again" in again.stderr
    assert {**json.loads(again.stdout), "seconds": 0} == {**json.loads(first.stdout), "seconds": 0}
    other = run(*command, "--lr", 0.02)
    assert other.exit_code == 1 and out.read_bytes() == written
    assert "trained already, but differently: lr 0.01 there, 0.02 now. --overwrite trains again" in other.stderr
    forced = run(*command, "--force")
    assert forced.exit_code == 0 and out.stat().st_mtime_ns > then
    assert out.read_bytes() == written, "one seed, one precision, one machine"
    record = read_checkpoint(out).record["training"]
    assert (record["dtype"], record["precision"]) == ("float32", "float32")
    replaced = run(*command, "--lr", 0.02, "--overwrite")
    assert replaced.exit_code == 0 and read_checkpoint(out).record["training"]["lr"] == 0.02
    replaced = run(*command, "--lr", 0.03, "--force")
    assert replaced.exit_code == 0 and read_checkpoint(out).record["training"]["lr"] == 0.03


@pytest.mark.slow
def test_changed_pictures_are_seen_under_the_same_names(pictures: Path, backbone: Backbone, tmp_path: Path) -> None:
    """In a finished task of many, and in an interrupted run."""
    tasks, out = tmp_path / "tasks.toml", tmp_path / "out"
    shutil.copytree(pictures, tmp_path / "other")
    tasks.write_text('[tasks.a]\ndata = "set"\n[tasks.b]\ndata = "other"\n')
    command = ("--tasks", tasks, "--out", out, "--json", *FAST)
    assert run(*command).exit_code == 0
    interrupt(pictures, backbone, tmp_path / "stopped")
    Image.new("RGB", (16, 16)).save(pictures / "dark" / "0.png")
    again = run(*command)
    rows = {row["task"]: row for row in json.loads(again.stdout)}
    assert again.exit_code == 1
    assert "trained already, but differently: other pictures, classes or splits" in rows["a"]["error"]
    assert rows["b"]["trained"] is False
    stopped = run("t", "--data", pictures, "--out", tmp_path / "stopped", *FAST)
    assert stopped.exit_code == 1
    assert "stopped.partial: holds the state of another interrupted run: other pictures" in stopped.stderr
    seen: list[int] = []
    train(config(), backbone, open_dataset(str(pictures)), tmp_path / "stopped", lambda step: seen.append(step.epoch))
    assert seen[0] == 1, "a call begins anew, rather than go on with other pictures"
    mended = run(*command, "--overwrite")
    assert [row["trained"] for row in json.loads(mended.stdout)] == [True, False]


def test_what_differs_is_named(pictures: Path, backbone: Backbone, tmp_path: Path) -> None:
    data = open_dataset(str(pictures))
    train(config(), backbone, data, tmp_path / "t")
    now = run_identity(config(), backbone, data, None)
    there = identity_of(read_checkpoint(tmp_path / "t"))
    assert differences(there, now) == []
    assert is_finished(tmp_path / "t", lambda: now)
    assert differences(there, {**now, "given": "x", "backbone": "y", "task": "u"}) == [
        "task t there, u now", "another backbone", "made from other tasks or bases, or changed after training",
    ]  # fmt: skip
    assert differences({**there, "preprocess": {}}, now) == ["pictures read or resized in another way"]
    older = {key: value for key, value in there.items() if key != "data"}
    assert differences(older, now) == ["no record of its data"]
    partial_path(tmp_path / "t").write_bytes(b"")
    assert is_finished(tmp_path / "t", lambda: now)
    assert not partial_path(tmp_path / "t").exists(), "of a run killed between its last two steps"


def test_nothing_but_a_runs_own_file_is_replaced(pictures: Path, backbone: Backbone, tmp_path: Path) -> None:
    data = open_dataset(str(pictures))
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    for extra in ((), ("--overwrite",), ("--force",)):
        done = run("t", "--data", pictures, "--out", notes, *extra, *FAST)
        assert done.exit_code == 1
        assert "notes.txt: what is there is not a task checkpoint, so it is not replaced" in done.stderr
    with pytest.raises(ConfigError, match="not a task checkpoint, so it is not replaced"):
        train(config(), backbone, data, notes)
    assert notes.read_text() == "precious"
    partial_path(tmp_path / "t").write_text("precious")
    with pytest.raises(ConfigError, match="expected nothing or a run's state, found something else"):
        train(config(), backbone, data, tmp_path / "t")
    assert partial_path(tmp_path / "t").read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="--out .*pipe: a pipe: expected a file"):
        train(config(), backbone, data, tmp_path / "pipe")
    (tmp_path / "empty").touch()  # as mktemp makes it
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    check_out(tmp_path / "empty")
    check_out(tmp_path / "link")


def test_a_folder_that_takes_no_file_is_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no file: File name too long"):
        check_out(tmp_path / ("x" * 250))
    with pytest.raises(ConfigError, match="does not exist; make it first"):
        check_out(tmp_path / "gone" / "t")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory|is not a folder"):
        check_out(tmp_path / "file" / "t")
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        os.seteuid(65534)
        with pytest.raises(ConfigError, match="takes no file: Permission denied"):
            check_out(folder / "t")
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_a_disk_without_room_is_found_before_training(pictures: Path, backbone: Backbone, small_disk: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs up to [\d,]+ bytes there, the disk has"):
        train(config(rank=64), backbone, open_dataset(str(pictures)), small_disk / "t",
              lambda step: pytest.fail("a step was trained"))  # fmt: skip
    assert not list(small_disk.iterdir())


# ---- pictures of runs -------------------------------------------------------------------------


def test_a_plot_that_cannot_be_drawn_is_said_before_training(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pear_train.cli.work.train_many", lambda *_, **__: pytest.fail("trained"))
    command = ("t", "--data", pictures, "--out", tmp_path / "t.safetensors", "--plot", *FAST)
    (tmp_path / "t.png").write_bytes((pictures / "dark" / "0.png").read_bytes())
    done = run(*command)
    assert done.exit_code == 1
    assert "t.png: pear-train did not write this file, so it is not replaced" in done.stderr
    (tmp_path / "t.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(*command)
    assert done.exit_code == 1 and "--plot needs matplotlib: pip install 'pear-adapters[demo]'" in done.stderr


@pytest.mark.slow
def test_results_come_before_plots(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("t", "--data", pictures, "--out", tmp_path / "t.safetensors", "--plot", *FAST)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.figure.Figure.savefig", full)
        done = run(*command)
    assert done.exit_code == 1
    assert "t (pear): val" in done.stdout
    assert "Error: t: " in done.stderr and "t.png: cannot be written: No space left" in done.stderr
    drawn = run(*command)  # of the finished run
    assert drawn.exit_code == 0 and "trained already" in drawn.stderr
    check_plot(tmp_path / "t.png")
    assert plot_path(tmp_path / "a.v1") == tmp_path / "a.v1.png", "a.v1 and a.v2 have a picture each"


# ---- numbers that are none any more -----------------------------------------------------------


@pytest.fixture
def task_run(pictures: Path, backbone: Backbone) -> Iterator[TaskRun]:
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32, for_training=True)
    yield TaskRun(config(method="adapters"), adapted, open_dataset(str(pictures)))


@torch.no_grad()
def test_numbers_that_are_not_finite_are_never_scored_or_kept(task_run: TaskRun) -> None:
    task_run.check_finite()
    up = next(iter(task_run.adapters.up.values()))
    up[0, 0] = 7e4  # finite, but not in float16
    with pytest.raises(DivergedError, match=r"t: training diverged: after epoch 1, up\.a0 is not finite as F16; lower"):
        task_run.check_finite()
    up[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="logits on val are not finite"):
        task_run.head.weight.fill_(1)
        task_run.accuracy(task_run.val_pixels)


def test_a_loss_that_is_none_ends_the_run_at_that_step(task_run: TaskRun) -> None:
    rows = task_run.next_rows()
    features = torch.full((len(rows), task_run.adapted.feature_width), float("nan"))
    with torch.no_grad():
        task_run.head.weight.fill_(1)
    task_run.loss(features, rows)
    with pytest.raises(DivergedError, match="the loss became nan in epoch 1"):
        task_run.after_step()


def test_a_memory_that_is_too_small_is_named() -> None:
    with pytest.raises(ResourceError, match="t: out of memory: lower --batch-size"), memory_named("t"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shape"), memory_named("t"):
        torch.ones(2) @ torch.ones(3, 3)


# ---- interruptions, options without a use -----------------------------------------------------


@pytest.mark.slow
def test_a_run_that_goes_on_elsewhere_says_so(pictures: Path, backbone: Backbone, tmp_path: Path) -> None:
    data = open_dataset(str(pictures))
    train(config(), backbone, data, tmp_path / "whole")
    lines: list[str] = []
    interrupt(pictures, backbone, tmp_path / "here")
    train(config(), backbone, data, tmp_path / "here", say=lines.append)
    assert lines == ["t: goes on after epoch 1 of 2"]
    assert (tmp_path / "here").read_bytes() == (tmp_path / "whole").read_bytes()
    interrupt(pictures, backbone, tmp_path / "there")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        train(config(), backbone, data, tmp_path / "there", say=lines.append)
    finally:
        torch.set_num_threads(threads)
    assert f"began on another machine, with torch {torch.__version__}, device cpu, threads {threads}," in lines[-1]
    machines = read_checkpoint(tmp_path / "there").record["training"]["machines"]
    assert [one["threads"] for one in machines] == [threads, threads + 1]


def test_options_that_say_nothing_are_named_or_refused(pictures: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('epochs = 1\nmethod = "linear"\n[tasks.a]\ndata = "set"\n')
    done = run("--tasks", tasks, "--out", tmp_path / "out", "--ratio", 0.5, "--epochs", 7, "--json")
    assert done.exit_code == 0, done.stderr
    assert "--ratio has no effect: this run of method 'linear' does not use it" in done.stderr
    assert "--epochs has no effect: the file of tasks overrides it" in done.stderr
    one = ("t", "--data", pictures, "--out", tmp_path / "t")
    for args, message in (
        ((*one, "--together", 2), "--together needs --tasks"),
        ((*one, "--bank-tasks", "a"), "--bank-tasks needs --bank"),
        (("--tasks", tasks, "--make-base", "--plot", "--out", tmp_path / "b"), "--make-base takes no --plot"),
        (("--tasks", tasks, "--ray=auto", "--tensorboard", tmp_path, "--out", tmp_path / "b"), "--ray takes no"),
    ):
        refused = run(*args)
        assert refused.exit_code == 2 and message in refused.stderr


@pytest.mark.slow
def test_a_base_set_follows_the_same_rule(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "other")
    tasks = tmp_path / "tasks.toml"
    tasks.write_text('[tasks.a]\ndata = "set"\n[tasks.b]\ndata = "other"\n')
    command = ("--tasks", tasks, "--make-base", "--out", tmp_path / "base", "--json", *FAST)
    first = run(*command)
    assert first.exit_code == 0, first.stderr
    again = run(*command)
    assert again.exit_code == 0 and "made already, with the same options and data" in again.stderr
    assert json.loads(again.stdout)["val_top1"] == json.loads(first.stdout)["val_top1"]
    Image.new("RGB", (16, 16)).save(tmp_path / "other" / "dark" / "0.png")
    assert "but differently: other pictures" in run(*command).stderr
    tasks.write_text('[tasks.a]\ndata = "set"\n[tasks.b]\ndata = "other"\nrank = 3\n')
    refused = run(*command)
    assert refused.exit_code == 1
    assert "base set: rank: expected one value for all tasks, found 2 for 'a' and 3 for 'b'" in refused.stderr


@pytest.mark.parametrize("preview", [False, True])
def test_pictures_of_which_no_batch_fits_are_refused_before_they_are_read(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preview: bool
) -> None:
    """Ten of 16,384 pixels a side take 8.1 GB decoded, and 32.2 GB as numbers."""
    monkeypatch.setattr("pear_train.memory.memory_of", lambda device: 16 * 10**9)
    monkeypatch.setattr("pear_train.data.pixels.Pixels._decode_all", None)
    args = ["t", "--data", pictures, "--out", tmp_path / "t", "--method", "linear", "--img-size", 16_384]
    done = run(*args, *(["--preview", tmp_path / "p.png"] if preview else []))
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    line = "a batch of 10 images of 16384 x 16384 pixels takes 32.2 GB before any step, and cpu has 16.0 GB: lower"
    assert done.stderr.count(line) == done.stderr.count("Error") == 1 + preview, done.stderr


def test_the_memory_is_this_machine_s() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("needs /proc/meminfo")
    (kilobytes,) = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert memory_of(torch.device("cpu")) == pytest.approx(1024 * int(kilobytes), rel=0.01)
