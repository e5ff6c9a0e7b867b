"""What pear-train says, draws and writes of a run: epochs in a log, a preview, curves, a report, a plot."""

import csv
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pear_store import read_checkpoint
from pear_store.exchange.curve import draw_curve
from pear_train import TrainConfig, open_dataset
from pear_train.cli import main
from pear_train.cli.progress import duration
from pear_train.curves import check_csv, write_csv
from pear_train.errors import ConfigError, ResourceError
from pear_train.html.page import write_page
from pear_train.html.training import accuracy_chart, loss_chart
from pear_train.plot import plot_result
from pear_train.preview import some_of_each, write_preview
from pear_train.report import Result as RunResult
from pear_train.report import Step, result_of
from router import Backbone

FAST = ("--epochs", "3", "--img-size", "48", "--positions", "blocks", "--rank", "2", "--dtype", "float32")


@pytest.fixture(autouse=True)
def backbone_is_loaded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_train.cli.work.load_backbone", lambda name, weights: backbone)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes told apart by their light; names that a page must escape."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"classes": np.array(["dark", "light <b>"])}
    for name, counts in (("train", (12, 5)), ("val", (6, 6))):
        y = np.repeat(np.arange(2), counts)
        noise = rng.normal(0, 20, (len(y), 24, 24))
        arrays[f"x_{name}"] = np.clip(60 + 120 * y[:, None, None] + noise, 0, 255).astype(np.uint8)
        arrays[f"y_{name}"] = y
    path = tmp_path_factory.mktemp("told") / "d.npz"
    np.savez(path, **arrays)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


@pytest.fixture(scope="module")
def told(data: Path, tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> tuple[Path, Result]:
    """A folder with everything that one run can write."""
    folder = tmp_path_factory.mktemp("all")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pear_train.cli.work.load_backbone", lambda name, weights: backbone)
        done = run(
            "t", "--data", data, "--out", folder / "t.safetensors", *FAST, "--html", folder / "r.html",
            "--preview", folder / "p.png", "--curves", folder / "c.csv", "--tensorboard", folder / "tb", "--plot",
            "--balance", "weights", "--select", "macro_f1", "--threshold-accuracy", "0.5",
        )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return folder, done


# ---- what it says ---------------------------------------------------------------------------------


def test_a_log_has_a_line_for_each_epoch_and_no_bar(told: tuple[Path, Result]) -> None:
    said = told[1].stderr
    assert "\r" not in said and "it/s" not in said and "\x1b" not in said
    lines = re.findall(
        r"^epoch (\d)/3  loss +[\d.]+  train +[\d.]+ %  val +[\d.]+ % +\d+ s left  [\d.]+ GB$", said, re.M
    )
    assert lines == ["1", "2", "3"]
    assert "machine   trains in float32 on cpu, " in said
    assert "balance   12 training images of 'dark', 5 of 'light <b>', 2.4 to 1" in said
    assert "val F1 %" in told[1].stdout and "threshold 0.0000: all answers on val" in told[1].stdout


def test_durations_are_short() -> None:
    assert [duration(s) for s in (0.4, 99, 170, 7500)] == ["0 s", "99 s", "3 min", "2 h 05"]


def test_ctrl_c_says_how_to_go_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("t", "--data", data, "--out", tmp_path / "t o.safetensors", *FAST)

    def stop_after(epoch: int) -> None:
        def show(self: object, step: Step) -> None:
            if step.epoch == epoch and step.batch == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr("pear_train.curves.Curves.show", show)

    stop_after(1)
    stopped = run(*command)
    assert stopped.exit_code == 130 and "Stopped: no epoch had ended; the same command starts anew" in stopped.stderr


def test_ctrl_c_says_which_epoch_is_kept(
    data: Path, tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(arg) for arg in ("t", "--data", data, "--out", tmp_path / "t o.safetensors", *FAST)]

    def show(self: object, step: Step) -> None:
        if step.epoch == 3:
            raise KeyboardInterrupt

    def stop(self: object, step: Step) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pear_train.curves.Curves.show", show)
        stopped = run(*command)
    assert stopped.exit_code == 130
    assert "Stopped: t: epoch 2 of 3 is kept; the same command resumes from there:" in stopped.stderr
    assert f"pear-train t --data {data} --out '{tmp_path}/t o.safetensors' --epochs 3" in stopped.stderr
    with monkeypatch.context() as patched:  # and a second time, before an epoch ends
        patched.setattr("pear_train.cli.progress.Progress.show", show)
        assert "Stopped: t: epoch 2 of 3 is kept; the same command resumes" in run(*command).stderr
        patched.setattr("pear_train.cli.progress.Progress.show", stop)
        other = [*command, "--lr", "0.02", "--overwrite"]
        assert "Stopped: no epoch had ended; the same command starts anew" in run(*other).stderr
    again = run(*command)
    assert again.exit_code == 0 and "t: goes on after epoch 2 of 3" in again.stderr


def test_ctrl_c_of_many_tasks_says_what_is_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tmp_path / "tasks.toml"
    tasks.write_text("".join(f'[tasks.{name}]\ndata = "{data}"\n' for name in "abc"))
    command = ("--tasks", tasks, "--out", tmp_path / "out", *FAST, "--force")

    def show(self: object, step: Step) -> None:
        if step.task == "b" and step.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("pear_train.curves.Curves.show", show)
    told = "Stopped: 1 of 3 tasks are trained; b: epoch 2 of 3 is kept; the same command resumes from there"
    assert f"{told}, and trains finished tasks anew (--force):" in run(*command).stderr
    assert f"{told}:" in run(*command[:-1]).stderr


def test_the_command_that_goes_on_is_what_a_shell_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a line of its own, whatever words it has."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pear_train.cli.command.do_work", stop)
    odd = ["it's", "a b", "$HOME", "", "line\nbreak", "tab\t' \\n", "été", "\u202e", os.fsdecode(b"\xff1")]
    words = ["t", "--data", "d", "--out", "o", *(word for name in odd for word in ("--weights", name))]
    lines = CliRunner().invoke(main, words).stderr.splitlines()
    assert lines[0] == "Stopped: nothing was written; the same command again:" and len(lines) == 2
    assert lines[1].startswith("    pear-train t --data d ")
    script = lines[1].replace("pear-train", "printf '%s\\0'", 1)
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout
    assert [os.fsdecode(word) for word in said.split(b"\0")[:-1]] == words


def test_an_early_stop_is_said(data: Path, tmp_path: Path) -> None:
    done = run(
        "t", "--data", data, "--out", tmp_path / "t", "--method", "linear", "--img-size", 48, "--lr", 1e-9,
        "--epochs", 30, "--patience", 2,
    )  # fmt: skip
    assert done.exit_code == 0 and "stopped   after epoch 3 of 30: val did not improve (--patience)" in done.stderr


# ---- what it writes -------------------------------------------------------------------------------


def test_curves_are_those_of_the_checkpoint(told: tuple[Path, Result]) -> None:
    history = read_checkpoint(told[0] / "t.safetensors").record["training"]["history"]
    with open(told[0] / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row.pop("epoch")) for row in rows] == [1, 2, 3]
    assert [{key: float(value) for key, value in row.items()} for row in rows] == history


def test_tensorboard_reads_what_was_written(told: tuple[Path, Result]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(told[0] / "tb" / "t"))
    found.Reload()
    history = read_checkpoint(told[0] / "t.safetensors").record["training"]["history"]
    for name, tag in (("loss", "loss/train"), ("val_top1", "top1/val"), ("val_macro_f1", "macro_f1/val")):
        events = found.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx([epoch[name] for epoch in history], abs=1e-6)


def test_what_is_not_ours_is_not_replaced(data: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    for flag in ("--html", "--preview", "--curves"):
        refused = run("t", "--data", data, "--out", tmp_path / "t", *FAST, flag, tmp_path / "x")
        assert refused.exit_code == 1 and f"{flag} {tmp_path / 'x'}: pear-train did not write" in refused.stderr
        refused = run("t", "--data", data, "--out", tmp_path / "t", *FAST, flag, tmp_path / "no" / "x")
        assert refused.exit_code == 1 and f"folder {tmp_path / 'no'} does not exist" in refused.stderr
    assert (tmp_path / "x").read_text() == "mine" and not (tmp_path / "t").exists()
    of_many = run("--tasks", tmp_path / "x", "--out", tmp_path / "o", "--html", tmp_path / "r")
    assert of_many.exit_code == 2 and "--html: only for one task" in of_many.stderr


def refused(tmp_path: Path, *args: object) -> str:
    """The last line of a command that is refused before it opens the data."""
    (tmp_path / "d.npz").write_bytes(b"no data")
    done = run("t", "--data", tmp_path / "d.npz", *FAST, *args)
    assert done.exit_code in (1, 2) and "NumPy" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--html", "--preview", "--curves"])
def test_two_outputs_are_never_one_file(tmp_path: Path, flag: str) -> None:
    out = tmp_path / "t.safetensors"
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "here").symlink_to(tmp_path)
    same = (tmp_path / "here" / "t.safetensors", tmp_path / "link", tmp_path / "no" / ".." / "t.safetensors")
    for path in (out, *same):
        assert f"{flag} {path}: --out writes this file, too" in refused(tmp_path, "--out", out, flag, path)
    for name in ("t.safetensors.partial", ".t.safetensors.partial.tmp", ".t.safetensors.evaluated"):
        assert "--out (meanwhile) writes this file, too" in refused(tmp_path, "--out", out, flag, tmp_path / name)
    assert "--plot writes this file" in refused(tmp_path, "--out", out, "--plot", flag, tmp_path / "t.png")
    for other in {"--html", "--preview", "--curves"} - {flag}:
        told = refused(tmp_path, "--out", out, flag, tmp_path / "x", other, tmp_path / "x")
        assert "writes this file, too: name another" in told and flag in told and other in told
    assert "--data reads this file, so it is not replaced" in refused(tmp_path, "--out", out, flag, tmp_path / "d.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "here", "link"]


def test_no_output_is_what_is_read(tmp_path: Path) -> None:
    """Not even with --overwrite, which would replace a task checkpoint."""
    (tmp_path / "b").write_bytes(b"some task")
    os.link(tmp_path / "b", tmp_path / "linked")
    for flag in ("--base", "--bases", "--weights"):
        for out in ("b", "linked"):
            told = refused(tmp_path, "--out", tmp_path / out, flag, tmp_path / "b", "--overwrite")
            assert f"--out {tmp_path / out}: {flag} reads this file, so it is not replaced" in told
    (tmp_path / "o").mkdir()
    (tmp_path / "tasks.toml").write_text('[tasks.a]\ndata = "o/a.png"')
    done = run("--tasks", tmp_path / "tasks.toml", "--out", tmp_path / "o", "--plot")
    assert done.exit_code == 2
    assert f"--plot {tmp_path}/o/a.png: data of task a reads this file, so it is not replaced" in done.stderr
    done = run("--tasks", tmp_path / "tasks.toml", "--out", tmp_path / "o", "--base", tmp_path / "o" / "a.safetensors")
    assert done.exit_code == 2 and "--base reads this file, so it is not replaced" in done.stderr


def test_no_picture_is_drawn_among_those_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "set" / "cat").mkdir(parents=True)
    for option, out in (("--preview", tmp_path / "t"), ("--plot", tmp_path / "set" / "cat" / "p.safetensors")):
        drawn = tmp_path / "set" / "cat" / "p.png"
        done = run("t", "--data", tmp_path / "set", "--out", out, option, *([drawn] if option == "--preview" else []))
        assert done.exit_code == 2
        assert f"{option} {drawn}: would become a picture of the data in {tmp_path / 'set'}" in done.stderr


def test_a_folder_for_tensorboard_is_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "t").write_text("mine")
    out = tmp_path / "t.safetensors"
    for path, file in (("file", "file"), ("file/tb", "file"), ("tb", "tb/t")):
        told = refused(tmp_path, "--out", out, "--tensorboard", tmp_path / path)
        assert f"--tensorboard {tmp_path / path}: {tmp_path / file} is not a folder: name another" in told
    same = refused(tmp_path, "--out", tmp_path / "x" / "t", "--tensorboard", tmp_path / "x")
    assert "--out writes this file, too" in same
    told = refused(tmp_path, "--out", out, "--tensorboard", out / "tb")
    assert f"lies below {out}, where --out writes a file" in told
    assert not out.exists()


def test_a_target_that_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"\xe9poque,loss\n")
    (tmp_path / "zeros").write_bytes(bytes(100))
    long = "x" * 250
    for flag in ("--curves", "--html", "--preview"):
        for name, told in (
            ("folder", "a directory: expected a file"), ("pipe", "a pipe: expected a file"),
            ("latin", "did not write this file, so it is not replaced"),
            ("zeros", "did not write this file, so it is not replaced"),
            (long, "takes no file of this name: File name too long"),
        ):  # fmt: skip
            line = refused(tmp_path, "--out", tmp_path / "t", flag, tmp_path / name)
            assert line.startswith(f"Error: {flag} {tmp_path / name}: ") and told in line


def test_a_file_of_curves_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *args: object) -> int:
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "c.csv").write_text("epoch,loss,\n")
    monkeypatch.setattr("pear_store.files.os.open", refuse)
    with pytest.raises(ConfigError, match=r"--curves .*c\.csv: cannot be read: Permission denied"):
        check_csv(tmp_path / "c.csv")


def test_a_drawing_that_fails_loses_no_training(
    data: Path, tmp_path: Path, told: tuple[Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised: of curves in an epoch, of a plot or a report at the end. The exit code says so."""

    def fail(*args: object, **settings: object) -> None:
        raise ValueError("no\nfont")

    monkeypatch.setattr("pear_train.preview._sheet", fail)
    monkeypatch.setattr("pear_train.curves.write_csv", fail)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    monkeypatch.setattr("pear_train.html.training.accuracy_chart", fail)
    out = tmp_path / "t.safetensors"
    done = run(
        "t", "--data", data, "--out", out, *FAST, "--balance", "weights", "--select", "macro_f1", "--plot",
        "--threshold-accuracy", "0.5", "--html", tmp_path / "r.html", "--curves", tmp_path / "c.csv", "--json",
        "--preview", tmp_path / "p.png",
    )  # fmt: skip
    assert done.exit_code == 1 and json.loads(done.stdout)["task"] == "t"
    assert out.read_bytes() == (told[0] / "t.safetensors").read_bytes()
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == [
        "Error: t: --preview: cannot be drawn: no font",
        "Error: t: curves: cannot be drawn: no font",
        "Error: t: --plot: cannot be drawn: no font",
        "Error: t: --html: cannot be drawn: no font",
    ]


def test_a_run_that_is_there_already_is_written_and_drawn_again(told: tuple[Path, Result], data: Path) -> None:
    folder = told[0]
    before = (folder / "c.csv").read_bytes()
    for name in ("c.csv", "r.html"):
        (folder / name).unlink()
    again = run(
        "t", "--data", data, "--out", folder / "t.safetensors", *FAST, "--balance", "weights", "--select", "macro_f1",
        "--threshold-accuracy", "0.5", "--curves", folder / "c.csv", "--html", folder / "r.html",
    )  # fmt: skip
    assert again.exit_code == 0 and "trained already" in again.stderr
    assert (folder / "c.csv").read_bytes() == before and (folder / "r.html").exists()


# ---- the preview ----------------------------------------------------------------------------------


def test_the_preview_shows_pictures_of_every_class(told: tuple[Path, Result], data: Path) -> None:
    rows = some_of_each(open_dataset(str(data)).train.targets, 8, torch.Generator().manual_seed(0))
    assert sorted(open_dataset(str(data)).train.targets[rows].tolist()) == [0] * 4 + [1] * 4
    sheet = Image.open(told[0] / "p.png")
    assert sheet.size == (8 * 168 + 8, 3 * 202 + 8) and sheet.info["Software"] == "pear-train"
    levels = np.asarray(sheet.convert("L"))
    shades = {int(levels[8 + 80, 8 + 168 * i + 80]) // 130 for i in range(8)}
    assert shades == {0, 1}, "dark ones and light ones"


def test_the_preview_shows_what_augmentation_does(data: Path, backbone: Backbone, tmp_path: Path) -> None:
    dataset = open_dataset(str(data))
    sheets = {}
    for augment in ("none", "rotate", "mixup"):
        told: dict[str, Any] = {"task": "t", "augment": augment, "img_size": 48}
        write_preview(TrainConfig(**told), backbone, dataset, tmp_path / augment)
        sheets[augment] = np.asarray(Image.open(tmp_path / augment).convert("RGB")).copy()
    assert len({sheet.tobytes() for sheet in sheets.values()}) == 3
    corner = (slice(8, 12), slice(8, 12))
    assert sheets["rotate"][corner].mean() == pytest.approx(124, abs=60)


def test_a_preview_changes_nothing_of_the_run(told: tuple[Path, Result], data: Path, tmp_path: Path) -> None:
    plain = run(
        "t", "--data", data, "--out", tmp_path / "t", *FAST, "--balance", "weights", "--select", "macro_f1",
        "--threshold-accuracy", "0.5",
    )  # fmt: skip
    assert plain.exit_code == 0
    assert (tmp_path / "t").read_bytes() == (told[0] / "t.safetensors").read_bytes()


# ---- the report and the plot ----------------------------------------------------------------------


class Page(HTMLParser):
    """Texts and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_report_says_what_the_checkpoint_says_and_asks_nobody(told: tuple[Path, Result]) -> None:
    text = (told[0] / "r.html").read_text()
    page, task = Page(text), read_checkpoint(told[0] / "t.safetensors")
    assert f"{100 * task.record['metrics']['val_top1']:.1f}" in page.texts
    assert "light <b>" in page.texts and "<b>light" not in text, "escaped"
    assert {"balance", "weights", "macro_f1"} <= set(page.texts)
    for position in task.record["training"]["importance"]:
        assert position in page.texts or f"{position} *" in page.texts
    assert not re.search(r"https?://(?!www\.w3\.org)", text) and "<script" not in text
    assert not [tag for tag, attributes in page.tags if tag in ("link", "script", "iframe") or "src" in attributes]
    polylines = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert len(polylines) == 3
    for line in polylines:
        assert len(str(line["points"]).split()) == 3, "a point for each epoch"


def test_a_report_names_files_whose_names_are_no_text(tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", f"<p>{os.fsdecode(b'caf' + bytes([0xE9]))}</p>")
    assert (tmp_path / "r.html").read_text() == r"<p>caf\udce9</p>"


def result(**changes: Any) -> RunResult:
    history = [{"loss": 1.0 / n, "train_top1": 0.5 + 0.01 * n, "val_top1": 0.4 + 0.02 * n} for n in range(1, 24)]
    importance = {"a.qkv": 1.0, "b.qkv": 0.5, "a.mlp": 0.2, "b.mlp": 0.1}
    made = RunResult(
        "t", "pear", 0.86, None, 1, 1, 0, 1, 1, 23, 20, 1.0, importance, {"b.qkv": "a.qkv", "b.mlp": "a.mlp"}, {},
        ["b.qkv", "b.mlp"], history, {}, prune_epoch=9,
    )  # fmt: skip
    return replace(made, **changes)


def test_charts_have_whole_epochs_and_a_mark_at_pruning() -> None:
    for chart in (accuracy_chart(result()), loss_chart(result())):
        assert [tick.text for tick in chart.x_ticks] == ["1", "5", "10", "15", "20"]
        assert [mark.text for mark in chart.marks] == ["epoch 20 is kept", "pruned after epoch 9"]
        epochs = {tick.text: tick.place for tick in chart.x_ticks}
        assert epochs["5"] < chart.marks[1].place < epochs["10"] < epochs["20"] == chart.marks[0].place
    assert [len(line.points.split()) for line in accuracy_chart(result()).lines] == [23, 23]
    assert [tick.text for tick in accuracy_chart(result(history=[result().history[0]], best_epoch=1)).x_ticks] == ["1"]


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], object]) -> list[Any]:
    """The axes of the figure that `draw` saves."""
    from matplotlib.figure import Figure

    axes: list[Any] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **settings: Any) -> None:
        save(self, *args, **settings)
        axes.extend(self.axes)

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        draw()
    return axes


def test_no_legend_covers_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (result(), result(importance={}, pruned=[], borrowed={}, prune_epoch=None)):
        curves = drawn(monkeypatch, partial(plot_result, made, tmp_path / "t.png"))[-2]
        assert curves.get_legend().get_window_extent().y0 >= curves.get_window_extent().y1
    (curve,) = drawn(monkeypatch, lambda: draw_curve({"train": [0.5, 0.9], "val": [0.4, 0.6]}, tmp_path / "c.png"))
    assert curve.get_legend().get_window_extent().y0 >= curve.get_window_extent().y1
    assert all(tick == int(tick) for tick in curve.get_xticks())


def test_an_adapter_that_is_pruned_although_it_matters_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result().passed_over == ["b.qkv"], "0.5, while a.mlp of 0.2 is kept"
    assert result(pruned=["b.mlp"]).passed_over == []
    bars, curves, losses = drawn(monkeypatch, lambda: plot_result(result(), tmp_path / "t.png"))
    assert [text.get_text() for text in bars.get_yticklabels()][1] == "b.qkv ← a.qkv *"
    assert "at least one adapter of each shape is kept" in bars.get_xlabel()
    assert all(tick == int(tick) for tick in curves.get_xticks())
    labels = [text.get_text() for text in curves.get_legend().get_texts()]
    assert labels == ["train top-1, %", "val top-1, %", "kept epoch", "pruned", "loss (right)"]
    assert list(losses.get_lines()[0].get_ydata()) == [epoch["loss"] for epoch in result().history]


def test_the_result_knows_when_it_was_pruned(told: tuple[Path, Result]) -> None:
    task = read_checkpoint(told[0] / "t.safetensors")
    assert result_of(task, 1).prune_epoch == 1 and result_of(task, 1).threshold == 0.0
    training = {**task.record["training"], "prune_epoch": 2}
    assert result_of(replace(task, record={**task.record, "training": training}), 1).prune_epoch == 2


def test_a_csv_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "c.csv", [{"loss": 1.0}])
    assert (tmp_path / "c.csv").read_text() == "epoch,loss\n1,1.0\n"
    with pytest.raises(ResourceError, match="--curves .*cannot be written"):
        write_csv(tmp_path, [{"loss": 1.0}])
