"""Several tasks at once, interrupted runs, banks, base sets, codes: small real problems."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from click.testing import Result as Ran

from pear_store import Store, make_task, read_checkpoint
from pear_train import (
    ConfigError,
    Failed,
    Job,
    Result,
    Split,
    TrainConfig,
    open_dataset,
    read_tasks,
    train,
    train_base,
    train_many,
)
from pear_train.cli import main
from pear_train.identity import given_digest
from pear_train.output import partial_path
from pear_train.report import Step
from router import Backbone, ImageError, Router
from router.tensors import to_torch
from tests.helpers.makers import floats
from tests.helpers.predictions import whole
from tests.helpers.stripes import write_stripes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of three tasks, of different class counts and lengths."""
    made = tmp_path_factory.mktemp("data")
    for i, (classes, count) in enumerate(((2, 40), (3, 50), (4, 36))):
        write_stripes(made / f"t{i}.npz", classes, count, i)
    return made


def config(name: str = "t0", **changes: Any) -> TrainConfig:
    base = {"task": name, "epochs": 4, "prune_epoch": 2, "rank": 4, "batch_size": 16, "dtype": "float32",
            "tensor_dtype": "F32", "head_dtype": "F32", "select": "last", "lr": 1e-2, "positions": "blocks",
            "ratio": 0.5}  # fmt: skip
    return TrainConfig(**{**base, **changes})


def matrices(path: Path) -> dict[str, torch.Tensor]:
    return {name: to_torch(raw).float() for name, raw in read_checkpoint(path).tensors.items()}


@pytest.mark.slow
def test_tasks_trained_together_come_out_as_alone(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    """Different ranks after pruning, class counts, batch counts and lengths; the third joins when a place is free."""
    options: list[dict[str, Any]] = [
        {"ratio": 0.5},
        {"knowledge": "exact", "ratio": 0.75},
        {"method": "adapters", "epochs": 3},
    ]
    jobs = []
    for i, changes in enumerate(options):
        made = config(f"t{i}", **{"dtype": "float32", **changes})
        jobs.append(Job(made, partial(open_dataset, str(folder / f"t{i}.npz")), tmp_path / f"t{i}"))
    steps: list[Step] = []
    results = list(train_many(jobs, backbone, steps.append, together=2))
    assert {result.task for result in results} == {"t0", "t1", "t2"}
    firsts = [next(n for n, step in enumerate(steps) if step.task == f"t{i}") for i in range(3)]
    assert firsts[1] == 1
    assert firsts[2] > firsts[1] + 4
    for job in jobs:
        train(job.config, backbone, job.dataset(), tmp_path / "alone")
        alone, together = matrices(tmp_path / "alone"), matrices(job.out)
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, atol=2e-3, rtol=2e-2, msg=f"{job.config.task} {name}")
        assert (
            read_checkpoint(job.out).record["training"]["pruned"]
            == read_checkpoint(tmp_path / "alone").record["training"]["pruned"]
        )


@pytest.mark.slow
def test_a_task_that_fails_costs_only_itself(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    jobs = [
        Job(config("t0", lr=1000, weight_decay=1000), lambda: open_dataset(str(folder / "t0.npz")), tmp_path / "t0"),
        Job(config("gone"), lambda: open_dataset("/nowhere"), tmp_path / "gone"),
        Job(config("t1", epochs=3), lambda: open_dataset(str(folder / "t1.npz")), tmp_path / "t1"),
    ]
    results = {result.task: result for result in train_many(jobs, backbone, together=3)}
    assert isinstance(results["t1"], Result)
    assert isinstance(failed := results["t0"], Failed) and "lower the learning rate" in failed.error
    assert isinstance(failed := results["gone"], Failed) and "no such file or folder" in failed.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t1"]


@pytest.mark.slow
def test_a_task_that_fails_in_its_evaluation_is_not_there_and_costs_only_itself(
    folder: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test image that goes while others train shows only at the end."""
    good = open_dataset(str(folder / "t0.npz"))
    test = good.test
    assert test is not None
    looks: list[int] = []

    def goes(number: int) -> Any:
        looks.append(number)
        if gone and len(looks) > 2 * len(test):  # each is hashed and decoded before the first epoch
            raise ImageError("0.png: cannot be read")
        return test.image(number)

    gone = True
    monkeypatch.setattr("pear_train.data.pixels.CACHE_BYTES", 0)
    fragile = replace(good, test=Split(goes, test.targets))
    jobs = [
        Job(config("fragile"), lambda: fragile, tmp_path / "fragile"),
        Job(config("gone"), lambda: good, tmp_path / "gone" / "gone"),
        Job(config("t0"), lambda: good, tmp_path / "t0"),
    ]
    results = {result.task: result for result in train_many(jobs, backbone, together=3)}
    assert isinstance(failed := results["fragile"], Failed) and "cannot be read" in failed.error
    assert isinstance(failed := results["gone"], Failed) and "gone does not exist; make it first" in failed.error
    assert isinstance(results["t0"], Result)
    assert not (tmp_path / "fragile").exists()
    assert partial_path(tmp_path / "fragile").exists()
    gone = False
    lines: list[str] = []
    again = list(
        train_many([Job(config("fragile"), lambda: fragile, tmp_path / "fragile")], backbone, say=lines.append)
    )
    assert isinstance(again[0], Result) and not partial_path(tmp_path / "fragile").exists()
    assert lines == ["fragile: goes on after epoch 3 of 4"]


def test_what_a_run_is_given_tells_base_from_bank(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    train(config("t0", method="adapters", epochs=1), backbone, open_dataset(str(folder / "t0.npz")), tmp_path / "t0")
    task = read_checkpoint(tmp_path / "t0")
    assert given_digest(None, []) is None
    assert given_digest(task, []) != given_digest(None, [task])


_RUNS = """
import os, sys, traceback
from pathlib import Path
from pear_train import TrainConfig, open_dataset, train
from router import load_backbone
for line in sys.stdin:
    options, data, out = eval(line)
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        try:
            train(TrainConfig(**options), load_backbone("pear_tiny"), open_dataset(data), Path(out),
                  lambda step: print(step.epoch, step.batch, flush=True))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)  # at once
"""


@pytest.fixture(scope="module")
def run_alone() -> Iterator[Callable[..., list[str]]]:
    """Trains in a process of its own, killed at the step `until`; gives its steps.

    The processes are children of one that has imported everything, which takes longer than to train, and done nothing.
    """
    with subprocess.Popen([sys.executable, "-c", _RUNS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as parent:  # fmt: skip
        assert parent.stdin is not None
        assert parent.stdout is not None
        told, said = parent.stdin, parent.stdout

        def run_one(options: dict[str, Any], data: Path, out: Path, until: str | None = None) -> list[str]:
            print(repr((options, str(data), str(out))), file=told, flush=True)
            child = int(said.readline())
            steps: list[str] = []
            while not (line := said.readline().strip()).startswith("ended"):
                assert line, "the processes' parent is gone"
                steps.append(line)
                if line == until:
                    os.kill(child, signal.SIGKILL)
            assert line == f"ended {0 if until is None else -signal.SIGKILL}"
            return steps

        yield run_one


@pytest.mark.slow
@pytest.mark.parametrize("knowledge", ["fold", "lowbit"])
def test_a_killed_run_goes_on_to_the_same_file(
    knowledge: str, folder: Path, tmp_path: Path, run_alone: Callable[..., list[str]]
) -> None:
    options = {**vars(config()), "epochs": 6, "knowledge": knowledge, "select": "best",
               "drop_branch": 0.2, "augment": "flip+crop"}  # fmt: skip
    out, whole, new = tmp_path / "out", tmp_path / "whole", tmp_path / "new"
    new.touch()
    run_alone(options, folder / "t0.npz", whole)
    epochs = []
    for until in ("2 1", "4 2", None):  # killed before pruning and after it
        steps = run_alone(options, folder / "t0.npz", out, until)
        epochs.append(steps[0].split()[0])
        assert partial_path(out).exists() == (until is not None)
        if until is not None:
            assert partial_path(out).stat().st_mode == new.stat().st_mode
    assert out.stat().st_mode == new.stat().st_mode
    assert epochs == ["1", "2", "4"]
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_partial_run_of_other_options_is_not_taken_up(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    data, out = open_dataset(str(folder / "t0.npz")), tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(step: Step) -> None:
        if step.epoch == 2:
            raise Stop

    seconds: list[tuple[dict[str, Any], int]] = [({}, 2), ({"lr": 2e-2}, 1), ({"ratio": 0.25}, 1)]
    for second, begins in seconds:
        with pytest.raises(Stop):
            train(config(), backbone, data, out, stop)
        seen: list[Step] = []
        train(config(**second), backbone, data, out, seen.append)
        assert seen[0].epoch == begins


@pytest.mark.slow
def test_a_run_goes_on_in_the_precision_it_began_in(
    folder: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = open_dataset(str(folder / "t0.npz")), tmp_path / "out"

    def stop(step: Step) -> None:
        if step.epoch == 2:
            raise InterruptedError

    monkeypatch.setattr("pear_train.machine.fast_precision", lambda device: torch.bfloat16)
    with pytest.raises(InterruptedError):
        train(config(dtype="auto"), backbone, data, out, stop)
    monkeypatch.setattr("pear_train.machine.fast_precision", lambda device: torch.float32)
    train(config(dtype="auto"), backbone, data, out)
    assert read_checkpoint(out).record["training"]["precision"] == "bfloat16"
    train(config(dtype="auto"), backbone, data, out)
    assert read_checkpoint(out).record["training"]["precision"] == "float32"


@pytest.mark.slow
def test_patience_stops_early_and_keeps_the_best(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    made = config(epochs=40, patience=2, select="best")
    result = train(made, backbone, open_dataset(str(folder / "t0.npz")), tmp_path / "out")
    after = [one["val_top1"] for one in result.history[2:]]
    assert result.epochs < 40
    assert len(after) - 1 - after.index(max(after)) == 2
    assert result.best_epoch > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "core", "head"),
    [("Q8", "Q8", "Q8"), ("Q4", "auto", "Q4"), ("Q2", "Q2", "Q2"), ("Q1", "Q4", "BF16"), ("BF16", "auto", "F32"),
     ("F32", "Q4", "F32")],
)  # fmt: skip
def test_codes_are_trained_and_routed(
    tensors: str, core: str, head: str, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    result = train(config(tensor_dtype=tensors, core_dtype=core, head_dtype=head, epochs=8), backbone,
                   open_dataset(str(folder / "t0.npz")), tmp_path / "out")  # fmt: skip
    task = read_checkpoint(tmp_path / "out")
    bits = {"Q8": 8, "Q4": 4, "Q2": 2, "Q1": 1, "BF16": 16, "F32": 32}[tensors]
    core_bytes = {"auto": 16 * 2, "Q8": 16 + 4 * 2, "Q4": 8 + 4 * 2, "Q2": 4 + 4 * 2}[core]
    scales = 6 * 2 * 4 * 2 if bits < 16 else 0
    cores = sum("basis" in entry for entry in task.record["adapters"].values())
    assert result.adapter_bytes == 6 * 2 * 192 * 4 * bits // 8 + scales + cores * core_bytes
    head_weight = {"Q8": 2 * 192 + 2 * 2, "Q4": 192 + 2 * 2, "Q2": 96 + 2 * 2, "BF16": 2 * 192 * 2, "F32": 2 * 192 * 4}[
        head
    ]
    assert result.head_bytes == head_weight + 2 * (4 if head == "F32" else 2)
    assert result.test_top1 is not None and result.test_top1 > 0.7
    with Store.create(tmp_path / "s") as store:
        store.add(tmp_path / "out")
        router = Router(backbone, store)
        data = open_dataset(str(folder / "t0.npz"))
        assert data.test is not None
        logits = whole(router.run([data.test.image(i) for i in range(24)], "t0"))
        assert float((logits.argmax(1) == data.test.targets).float().mean()) == pytest.approx(result.test_top1)
        store.export("t0", tmp_path / "again")
    assert read_checkpoint(tmp_path / "again").record["head"] == task.record["head"]


@pytest.mark.slow
def test_a_bank_is_borrowed_frozen_and_bit_identical(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    for borrow in ("core", "scale"):
        knowledge = "fold" if borrow == "core" else "none"
        first = config("t0", borrow=borrow, knowledge=knowledge)
        train(first, backbone, open_dataset(str(folder / "t0.npz")), tmp_path / "t0")
        bank = [read_checkpoint(tmp_path / "t0")]
        result = train(config("t1", borrow=borrow, knowledge=knowledge, bank_share=2), backbone,
                       open_dataset(str(folder / "t1.npz")), tmp_path / "t1", bank=bank)  # fmt: skip
        assert set(result.banked) == set(result.pruned)
        with Store.create(tmp_path / f"s-{borrow}") as store:
            store.add(tmp_path / "t0")
            added = store.add(tmp_path / "t1")
            used = sum(map(len, result.banked.values()))
            assert used > 0
            assert added.shared_bytes >= 2 * 192 * 4 * 4
        stored = {tensor.digest for tensor in bank[0].tensors.values()}
        task = read_checkpoint(tmp_path / "t1")
        names = {name for names in result.banked.values() for name in names}
        borrowed = [e for e in task.record["adapters"].values() if e["down"].split(".")[0] in names]
        assert len(borrowed) >= len(names)
        assert all(task.tensors[entry["down"]].digest in stored for entry in borrowed)
        outer = [entry.get("basis", entry["up"]) for entry in borrowed]
        assert all(task.tensors[name].digest in stored for name in outer)
        router = Router(backbone)
        router.add(task)
        assert whole(router.run(torch.zeros(1, 3, 48, 48), "t1")).shape == (1, 3)


@pytest.mark.slow
def test_a_bank_of_another_backbone_is_passed_over(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    data = open_dataset(str(folder / "t0.npz"))
    train(config("t0"), backbone, data, tmp_path / "t0")
    task = read_checkpoint(tmp_path / "t0")
    stranger = type(task)({**task.record, "backbone": {"model": "x", "digest": "sha256:" + "0" * 64}}, task.tensors)
    assert train(config("t0"), backbone, data, tmp_path / "t1", bank=[stranger]).banked == {}


@pytest.mark.slow
def test_strange_stored_tasks_are_passed_over_or_refused(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    """Of the right backbone by name, but with adapters of other widths, as a hostile checkpoint may have."""
    data = open_dataset(str(folder / "t0.npz"))
    train(config("t0", method="adapters", epochs=1), backbone, data, tmp_path / "t0")
    task = read_checkpoint(tmp_path / "t0")
    small = {
        f"a{i}.{side}": floats(np.ones(shape)) for i in range(12) for side, shape in (("down", (5, 2)), ("up", (2, 5)))
    }
    head = {name: tensor for name, tensor in task.tensors.items() if name.startswith("head")}
    odd = make_task(task.record, {**head, **small})
    assert not any(train(config("t1"), backbone, data, tmp_path / "t1", bank=[odd]).banked.values())
    with pytest.raises(ConfigError, match=r"expected widths \(192, 192\) at 'blocks.0.attn', found \(5, 5\)"):
        train(config("t1"), backbone, data, tmp_path / "t1", base=odd)
    with pytest.raises(ConfigError, match="expected fewer than 6, the blocks of .* at which tasks may part"):
        train(config("t1", base_blocks=6), backbone, data, tmp_path / "t1", base=task)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["Q4", "Q1"])
def test_common_down_in_codes_is_trained_as_it_is_written(
    bits: str, folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    data = open_dataset(str(folder / "t0.npz"))
    result = train(config("t0", down="common", method="adapters", tensor_dtype=bits), backbone, data, tmp_path / "t0")
    assert result.history[-1]["val_top1"] == pytest.approx(result.val_top1, abs=1e-6)


@pytest.mark.slow
def test_a_base_of_tasks_of_unequal_length(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    """The first is the shortest: it begins again, and is seen in every step."""
    write_stripes(tmp_path / "short.npz", 2, 20)
    data = [open_dataset(str(tmp_path / "short.npz")), open_dataset(str(folder / "t1.npz"))]
    steps: list[Step] = []
    made = train_base([config("short", augment="crop"), config("t1")], backbone, data, tmp_path / "base", steps.append)
    assert len(steps) == 4 * 4
    assert all(np.isfinite(step.loss) for step in steps)
    assert set(made.val_top1) == {"short", "t1"}


@pytest.mark.slow
def test_common_down_is_the_same_for_every_task(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    for i in range(2):
        train(config(f"t{i}", down="common", method="adapters", seed=i, tensor_dtype="F16"), backbone,
              open_dataset(str(folder / f"t{i}.npz")), tmp_path / f"t{i}")  # fmt: skip
    one, other = (read_checkpoint(tmp_path / f"t{i}") for i in range(2))
    for i in range(12):
        assert one.tensors[f"a{i}.down"].digest == other.tensors[f"a{i}.down"].digest
        assert one.tensors[f"a{i}.up"].digest != other.tensors[f"a{i}.up"].digest
    # the bytes that stores of any machine hold: a change of these strands them
    assert one.tensors["a0.down"].digest == "sha256:813936eb4d3552190fe180b039b7af1ca51cdc1efc692cac66a984dda095ba63"
    with Store.create(tmp_path / "s") as store:
        store.add(tmp_path / "t0")
        assert store.add(tmp_path / "t1").shared_bytes == 12 * 192 * 4 * 2


# ---- the command ------------------------------------------------------------------------------


def run(*args: object) -> Ran:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


FAST = ("--epochs", 3, "--set", "prune_epoch=1", "--rank", 4, "--batch-size", 16, "--positions", "blocks",
        "--ratio", 0.5)  # fmt: skip


@pytest.mark.slow
def test_tasks_file_trains_all_and_not_again(folder: Path, tmp_path: Path) -> None:
    file = folder / "tasks.toml"
    tables = (
        '[tasks.t0]\ndata = "t0.npz"',
        '[tasks.t1]\ndata = "t1.npz"\nratio = 0.25',
        '[tasks.gone]\ndata = "no.npz"',
    )
    file.write_text("\n".join(("lr = 0.01", *tables)))
    done = run("--tasks", file, "--out", tmp_path / "out", "--together", 2, "--json", "--plot", *FAST)
    assert done.exit_code == 1
    rows = {row["task"]: row for row in json.loads(done.stdout)}
    assert "no such file or folder" in rows["gone"]["error"]
    assert len(rows["t0"]["pruned"]) == 6
    assert len(rows["t1"]["pruned"]) == 3
    assert (tmp_path / "out" / "t0.png").stat().st_size > 10_000
    before = (tmp_path / "out" / "t0.safetensors").stat().st_mtime_ns
    (folder / "no.npz").write_bytes((folder / "t2.npz").read_bytes())
    again = run("--tasks", file, "--out", tmp_path / "out", "--json", *FAST)
    assert again.exit_code == 0
    assert [row["trained"] for row in json.loads(again.stdout)] == [False, False, True]
    assert (tmp_path / "out" / "t0.safetensors").stat().st_mtime_ns == before
    assert "2 of 3 are trained already" in again.stderr
    shown = run("--tasks", file, "--out", tmp_path / "out", *FAST)
    assert "was trained already" in shown.stdout
    row = next(row for row in json.loads(again.stdout) if row["task"] == "t1")
    size = row["adapter_bytes"] + row["knowledge_bytes"] + row["head_bytes"]
    assert next(line.split() for line in shown.stdout.splitlines() if line.startswith("t1"))[3] == f"{size:,}"


@pytest.mark.slow
def test_a_base_set_is_shared_below_and_started_from_above(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    file = folder / "base.toml"
    file.write_text('[tasks.t0]\ndata = "t0.npz"\n[tasks.t1]\ndata = "t1.npz"\n')
    made = run("--tasks", file, "--make-base", "--out", tmp_path / "base", "--json", *FAST)
    assert made.exit_code == 0, made.stderr
    assert set(json.loads(made.stdout)["val_top1"]) == {"t0", "t1"}
    base = read_checkpoint(tmp_path / "base")
    assert base.record["head"] is None
    done = run("--tasks", file, "--base", tmp_path / "base", "--base-blocks", 2, "--out", tmp_path / "out", *FAST)
    assert done.exit_code == 0, done.stderr
    with Store.create(tmp_path / "s") as store:
        added = [store.add(tmp_path / "out" / f"t{i}.safetensors") for i in range(2)]
        assert added[1].shared_bytes == 4 * 2 * 192 * 4 * 2
        router = Router(backbone, store)
        router.run_all(torch.zeros(3, 3, 48, 48), tasks=["t0", "t1"])
    tasks = [read_checkpoint(tmp_path / "out" / f"t{i}.safetensors") for i in range(2)]
    for task in tasks:
        for position in ("blocks.0.attn", "blocks.1.mlp"):
            entry = task.record["adapters"][task.positions[position][0].adapter]
            mine = base.record["adapters"][base.positions[position][0].adapter]
            assert task.tensors[entry["down"]].digest == base.tensors[mine["down"]].digest
        assert all(position.split(".")[1] not in "01" for position in task.record["training"]["importance"])
    wrong = run("t0", "--data", folder / "t0.npz", "--base", tmp_path / "base", "--out", tmp_path / "x", *FAST,
                "--rank", 2)  # fmt: skip
    assert "to start there, expected one of rank 2" in wrong.stderr


@pytest.mark.slow
def test_command_with_a_bank(folder: Path, tmp_path: Path) -> None:
    assert run("t0", "--data", folder / "t0.npz", "--out", tmp_path / "t0", *FAST).exit_code == 0
    with Store.create(tmp_path / "s") as store:
        store.add(tmp_path / "t0")
    done = run("t1", "--data", folder / "t1.npz", "--bank", tmp_path / "s", "--out", tmp_path / "t1", *FAST)
    assert done.exit_code == 0, done.stderr
    assert "bank b" in done.stdout
    missing = run(
        "t1", "--data", folder / "t1.npz", "--bank", tmp_path / "s", "--bank-tasks", "t9", "--out", tmp_path / "x"
    )
    assert missing.exit_code != 0 and "t9" in missing.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no task"),
        ("[tasks.a]\n", "task 'a': expected data ="),
        ("epoch = 3\n[tasks.a]\ndata = 'x'", "unknown option 'epoch': expected one of method, epochs"),
        ("[tasks.a]\ndata = 'x'\nlr = 'high'", "task 'a': lr = 'high': expected float"),
        ("[tasks.a]\ndata = 'x'\nratio = 2", "task 'a': ratio = 2: expected at least 0 and below 1"),
        ("[tasks.'../a']\ndata = 'x'", "task '../a': expected up to 100 letters"),
        ("[tasks.a]\ndata = 'x'\n[tasks.A]\ndata = 'x'", "task 'A': another task has the same name except for case"),
        ("[tasks", "not a readable TOML file"),
    ],
)
def test_mistakes_in_a_tasks_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_tasks(tmp_path / "tasks.toml", {})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x"], "expected either TASK with --data, or --tasks"),
        (["t", "--out", "x"], "expected either TASK with --data, or --tasks"),
        (["t", "--data", "d", "--tasks", "f", "--out", "x"], "expected either TASK with --data, or --tasks"),
        (["t", "--data", "d", "--make-base", "--out", "x"], "--make-base needs --tasks"),
        (["--tasks", "/nowhere.toml", "--out", "x"], "/nowhere.toml: no such file"),
        (["t", "--data", "d", "--base", "/nowhere", "--out", "x"], "/nowhere"),
        (["t", "--data", "d", "--bank", "/nowhere", "--out", "x"], "/nowhere"),
    ],
)
def test_mistakes(args: list[str], message: str) -> None:
    done = run(*args)
    assert done.exit_code != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
