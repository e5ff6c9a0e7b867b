"""What options take, judged in one place; and how the command line says them."""

import ast
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from pear_store import read_checkpoint
from pear_store.format.checkpoint import ACTIVATIONS
from pear_train import ConfigError, TrainConfig, choices
from pear_train.cli import main
from pear_train.cli.options import KNOWN, HeadedOption
from pear_train.config import OPTIONS
from pear_train.options import choices as choices_of
from pear_train.options import kinds, parse_settings

PACKAGE = Path(__file__).parents[2] / "pear_train"
FLAGS = {parameter.name for parameter in main.params}
FREE = {"positions", "augment", "device", "train_split", "val_split", "test_split"}
"""Options that are any text"""


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


# ---- types ------------------------------------------------------------------------------------


def test_an_option_with_a_fixed_choice_is_a_literal() -> None:
    for name, option in KNOWN.items():
        assert (kinds(option) == ["str"]) == (name in FREE or bool(choices_of(option))) or name == "knowledge_bits"
        assert not (choices_of(option) and name in FREE)
        for word in choices_of(option):
            if name not in ("method", "epochs"):  # of which not every one goes with the others
                checked = {"method": "adapters", name: word}
                assert getattr(TrainConfig(task="t", **checked), name) == word
    assert get_args(choices.Activation) == ACTIVATIONS
    assert set(get_args(choices.GradientScore)) < set(get_args(choices.Importance))


def test_no_parameter_that_is_a_choice_is_a_plain_string() -> None:
    """Wherever it goes by the name of the option."""
    names = {name for name, option in OPTIONS.items() if choices_of(option)} | {"role", "on_error", "rule", "kind"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.arg) and node.annotation is not None:
                name, annotation = node.arg, ast.unparse(node.annotation)
            elif isinstance(node, ast.AnnAssign):
                name, annotation = ast.unparse(node.target), ast.unparse(node.annotation)
            else:
                continue
            assert name not in names or annotation not in ("str", "int"), f"{file.name}: {name}: {annotation}"


def test_words_of_a_choice_are_listed_once() -> None:
    lists = [tuple(get_args(kind)) for kind in vars(choices).values() if get_args(kind)]
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Tuple | ast.List):
                words = tuple(word.value for word in node.elts if isinstance(word, ast.Constant))
                assert file.name == "choices.py" or words not in lists, f"{file}:{node.lineno}"


# ---- --set ------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "method": "adapters", "prune_epoch": 3, "positions": "blocks", "activation": "relu", "down": "common",
    "importance": "random", "sharing": "none", "borrow": "scale", "train_borrowed_scale": False, "knowledge": "exact",
    "knowledge_bits": 4, "augment": "flip", "img_size": 48, "device": "cuda", "dtype": "float32", "tensor_dtype": "Q4",
    "head_dtype": "Q8", "select": "last", "patience": 2, "drop_branch": 0.25, "warmup": 0.5, "ratio": 0.5,
    "core_dtype": "Q4", "own_bytes": 4000, "balance": "weights", "label_smoothing": 0.1, "threshold_accuracy": 0.95,
    "train_split": "a", "val_split": "none", "test_split": "b", "no_splits": True, "skip_unreadable": True,
}  # fmt: skip
"""A value that is not the default; where none stands here, the default and one more"""


@pytest.mark.parametrize("name", KNOWN)
def test_every_option_can_be_set_by_its_name(name: str) -> None:
    default: Any = KNOWN[name].default
    value = OTHER[name] if name in OTHER else default + 1
    assert value != default
    for key in (name, name.replace("_", "-")):
        told = parse_settings("--set", [f"{key}={value}"], KNOWN)
        assert told == {name: value} and type(told[name]) is type(value)
    if default is None and kinds(KNOWN[name]) != ["str"]:
        assert parse_settings("--set", [f"{name}=none"], KNOWN) == {name: None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank"], "--set: 'rank': expected name=value, such as rank=8"),
        (["ranks=3"], "--set: unknown option 'ranks': expected one of method, epochs, "),
        (["rank=3.5"], "--set: rank = '3.5': expected int"),
        (["rank=none"], "--set: rank = 'none': expected int"),
        (["scale=big"], "--set: scale = 'big': expected float"),
        (["scale=nan"], "--set: scale = nan: expected above 0"),
        (["scale=0"], "--set: scale = 0: expected above 0 and at most 1,000,000"),
        (["seed=-1"], "--set: seed = -1: expected at least 0 and at most 9,223,372,036,854,775,807"),
        (["sharing=best"], "--set: sharing = 'best': expected one of nearest, top, similar, none"),
        (["knowledge-bits=2"], "--set: knowledge_bits = 2: expected one of 1, 4"),
        (["train_borrowed_scale=maybe"], "--set: train_borrowed_scale = 'maybe': expected bool"),
        (["rank=3", "rank=4"], "--set: rank is set twice"),
        (["task=x"], "--set: unknown option 'task'"),
        (["\x1b[2J=3"], "--set: unknown option '\\x1b[2J'"),
    ],
)
def test_a_mistake_in_a_setting_is_one_clear_line(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_settings("--set", settings, KNOWN)
    assert str(raised.value).startswith(message)
    args = [word for setting in settings for word in ("--set", setting)]
    done = run("t", "--data", "/nowhere", "--out", "x", *args)
    assert done.exit_code == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: " + message.replace("\x1b", "\\x1b"))


def test_a_flag_and_a_setting_do_not_say_the_same(tmp_path: Path) -> None:
    done = run("t", "--data", "/nowhere", "--out", tmp_path / "t", "--rank", 3, "--set", "rank=4")
    assert done.exit_code == 1
    assert done.stderr == "Error: --set: rank is also given as --rank: give it once\n"


def test_settings_reach_the_run_and_the_notes(tmp_path: Path) -> None:
    images, targets = np.zeros((8, 16, 16, 3), np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "d.npz", x_train=images, y_train=targets, x_val=images, y_val=targets)
    (tmp_path / "tasks.toml").write_text('select = "best"\n[tasks.a]\ndata = "d.npz"\nseed = 3\n')
    args = ["--tasks", tmp_path / "tasks.toml", "--out", tmp_path / "out", "--method", "linear", "--img-size", 48]
    args += ["--set", "epochs=1", "--set", "select=last", "--set", "sharing=top", "--json"]
    done = run(*args)
    assert done.exit_code == 0, done.stderr
    training = read_checkpoint(Path(json.loads(done.stdout)[0]["file"])).record["training"]
    assert (training["epochs"], training["select"], training["seed"]) == (1, "best", 3)
    assert "--set sharing has no effect: this run of method 'linear' does not use it" in done.stderr
    assert "--set select has no effect: the file of tasks overrides it" in done.stderr


# ---- --help -----------------------------------------------------------------------------------


def test_what_only_a_study_sets_has_no_flag_and_help_names_it() -> None:
    (setting,) = [option for option in main.params if option.name == "settings"]
    assert isinstance(setting, click.Option) and setting.help is not None
    named = setting.help.partition("Only this sets ")[2].rstrip(".").replace(" and ", ", ").split(", ")
    assert sorted(named) == sorted(KNOWN.keys() - FLAGS)
    assert {"sharing", "borrow", "knowledge_bits", "scale_lr", "drop_branch", "max_grad_norm"} <= set(named)
    assert {"method", "rank", "ratio", "epochs", "lr", "seed", "device", "tensor_dtype"} <= FLAGS
    done = run("t", "--data", "d", "--out", "o", "--sharing", "top")
    assert done.exit_code == 2 and "No such option" in done.stderr


def test_help_has_a_heading_for_every_kind_of_option() -> None:
    lines = run("--help").stdout.splitlines()
    headings = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Data", "Backbone", "Method", "Training", "Several tasks", "Sharing between tasks", "Output", "Machine",
        "Other",
    ]  # fmt: skip
    for option in main.params:
        if isinstance(option, click.Option) and option.name != "version":  # click's own
            assert isinstance(option, HeadedOption) and option.help, option.name
    options = lines[lines.index("Data:") :]  # a line of the description may begin with an option, too
    flags = [line.split()[0] for line in options if line.startswith("  --")]
    assert len(flags) > 50
    assert len(flags) == len(set(flags))


def test_flags_take_what_their_fields_take() -> None:
    for option in main.params:
        if option.name in OPTIONS and choices_of(OPTIONS[option.name]):
            assert isinstance(option.type, click.Choice)
            assert tuple(option.type.choices) == choices_of(OPTIONS[option.name])
            assert option.default == OPTIONS[option.name].default
    assert {field.name for field in fields(TrainConfig)} == {"task", *OPTIONS}
