"""Options: what each takes, and which say nothing."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pear_train import ConfigError, TrainConfig, read_tasks
from pear_train.config import OPTIONS
from pear_train.options import kinds

NUMBERS = [name for name, option in OPTIONS.items() if set(kinds(option)) & {"int", "float"}]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_may_be_nonsense(name: str) -> None:
    values: list[Any] = [float("nan"), float("inf"), -float("inf"), -(2**70), 10**30, 10**5000, True, "3", [1]]
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name.replace('_', ' ')} .*: expected ") as raised:
            TrainConfig(task="t", **{name: value})
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_takes_another_type(name: str) -> None:
    values: list[Any] = [{}, b"x", 1j, "\x1b[2J" * 1000]
    for value in values:
        if not (isinstance(value, str) and kinds(OPTIONS[name]) == ["str"] and name in ("positions", "device")):
            with pytest.raises(ConfigError) as raised:
                TrainConfig(task="t", **{name: value})
            assert len(str(raised.value)) < 200 and "\x1b" not in str(raised.value)


def test_what_the_issue_named() -> None:
    nonsense: dict[str, Any] = {"lr": float("inf"), "epochs": 10**30, "rank": 2**40, "seed": -1, "warmup": 2.0,
                                "scale": 0.0, "weight_decay": -1.0, "img_size": 0, "borrowed_scale": 1e30}  # fmt: skip
    for name, value in nonsense.items():
        with pytest.raises(ConfigError, match=name.replace("_", " ")):
            TrainConfig(task="t", **{name: value})
    with pytest.raises(ConfigError, match="task name '../t': expected up to 100 letters"):
        TrainConfig(task="../t")


def test_the_ends_of_ranges_are_taken() -> None:
    ends: dict[str, Any] = {"epochs": 100_000, "rank": 4_096, "seed": 2**63 - 1, "warmup": 1, "ratio": 0, "lr": 1_000,
                            "max_grad_norm": 1e12, "weight_decay": 0, "patience": 1, "img_size": 16_384}  # fmt: skip
    config = TrainConfig(task="t", **ends)
    assert {name: getattr(config, name) for name in ends} == ends
    assert type(config.lr) is float, "1 and 1.0 are the same option, in a checkpoint, too"


def test_options_without_a_use_are_named() -> None:
    assert TrainConfig(task="t").unused(base=False, bank=False) == []
    linear = TrainConfig(task="t", method="linear", ratio=0.5, rank=4, lr=0.1)
    assert linear.unused(base=False, bank=False) == ["rank", "ratio"]
    adapters = TrainConfig(task="t", method="adapters", ratio=0.5, rank=4, base_blocks=2)
    assert adapters.unused(base=False, bank=False) == ["ratio", "base_blocks"]
    assert adapters.unused(base=True, bank=False) == ["ratio"]
    assert TrainConfig(task="t", knowledge_bits=4, bank_share=2).unused(False, False) == [
        "knowledge_bits",
        "bank_share",
    ]
    assert TrainConfig(task="t", borrow="scale", scale_lr=2, knowledge="none").unused(False, False) == []


def test_every_field_of_a_config_is_an_option() -> None:
    assert {field.name for field in fields(TrainConfig)} == {"task", *OPTIONS}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x = " + b"[" * 100_000, "not a readable TOML file"),
        (b"x = {a=" * 5_000, "not a readable TOML file"),
        (b"epochs = " + b"9" * 5_000, "not a readable TOML file: a number has more than 4,300 digits$"),
        (b"epochs = " + b"9" * 40 + b"\n[tasks.a]\ndata = 'x'", "epochs = of more than 20 digits: expected at least 1"),
        (b"lr = inf\n[tasks.a]\ndata = 'x'", "lr = inf: expected above 0 and at most 1,000"),
        (b"lr = nan\n[tasks.a]\ndata = 'x'", "lr = nan: expected above 0"),
        (b"lr = 1979-05-27\n[tasks.a]\ndata = 'x'", "lr = datetime.date.*: expected float"),
        (b"rank = 1099511627776\n[tasks.a]\ndata = 'x'", "rank = 1099511627776: expected at least 1 and at most 4,096"),
        (b"tasks = 3", "names no task"),
        (b"[tasks]\na = 3", "task 'a': expected data ="),
        (b"a\xff = 3", "not UTF-8"),
        (b"\x00", "not a readable TOML file"),
    ],
)
def test_tasks_files_of_any_bytes(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_tasks(tmp_path / "tasks.toml", {})


def test_a_pipe_or_a_folder_is_no_tasks_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "a pipe"), (".", "a directory"), ("gone", "no such file")):
        with pytest.raises(ConfigError, match=message):
            read_tasks(tmp_path / name, {})


def test_data_lies_beside_the_file_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name in the working directory is another one."""
    (tmp_path / "here" / "set").mkdir(parents=True)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "tasks.toml").write_text("[tasks.a]\ndata = 'set'\n[tasks.b]\ndata = 'torch/cifar10'\n")
    monkeypatch.chdir(tmp_path / "here")
    first, second = read_tasks(tmp_path / "lists" / "tasks.toml", {})
    assert first.data == str(tmp_path / "lists" / "set")
    assert second.data == "torch/cifar10"
