"""The command pear-eval: measures tasks on labelled images."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from platformdirs import user_data_path
from tqdm import tqdm

from pear_store import PearStoreError, ReadableStore, Store
from pear_store.counted import counted
from pear_store.format.checkpoint import shown_label
from pear_store.local.sources import Access
from pear_store.remote.cache import CacheSettings
from pear_store.terminal import NamedPath, NumberRange, allow_option, echo, echo_table, version_option
from pear_train.cli.options import HeadedCommand, option, run_option
from pear_train.cli.progress import say
from pear_train.data import DataOptions, open_labelled
from pear_train.errors import ConfigError, DataError, PearTrainError
from pear_train.evaluation.evaluated import Evaluated, Evaluation, evaluate
from pear_train.evaluation.gate import Gate
from pear_train.evaluation.report import changed, check_report, write_report
from pear_train.evaluation.sample import choose
from pear_train.evaluation.subjects import added, find_subjects, is_checkpoint
from pear_train.targets import check_apart
from pear_train.tasks import DATA_OPTIONS
from router import Limits, Router, RouterError

GATE_FAILED = 20
"""The exit code if the gate fails. Exit codes of errors are lower."""
_PATH = NamedPath(path_type=Path)
_THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99)
_MOST_CLASSES, _MOST_PAIRS, _MOST_NAMES = 40, 5, 5


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("references", metavar="TASK...", nargs=-1, required=True)
@option(
    "Data",
    "--data",
    required=True,
    help="Image folder, list of images (.csv, .jsonl, .parquet), folder of Hugging Face datasets, VTAB-1k folder, .npz "
    "file, or a data set's name in timm.",
)
@option("Data", "--data-root", type=_PATH, help="Folder of named data sets. They are downloaded to it.")
@option(
    "Data", "--split", type=click.Choice(["test", "val", "train", "all"]),
    help="Images to evaluate [default: test if the data has a test split, else all].",
)  # fmt: skip
@option("Data", "--known-only", is_flag=True, help="Leave out images of classes that a task does not have.")
@run_option("Data", "--train-split", "Folder of the train split [default: recognised by its name].")
@run_option("Data", "--val-split", "Folder of the val split.")
@run_option("Data", "--test-split", "Folder of the test split.")
@run_option("Data", "--no-splits", "The folders are classes, even if they are called train or test.")
@run_option("Data", "--max-pixels", "Refuse pictures with more pixels, before they are decoded.")
@option(
    "Store", "--store", "where", type=click.Path(), envvar="PEAR_STORE", default=str(user_data_path("pear") / "store"),
    help="Store of the tasks: a directory, or a remote's URL [default: $PEAR_STORE, else the user's data directory].",
)  # fmt: skip
@option(
    "Store", "--cache-bytes", type=click.IntRange(1), envvar="PEAR_CACHE_BYTES",
    show_default="$PEAR_CACHE_BYTES, else 10 GiB", help="The most bytes of a remote to cache on this machine.",
)  # fmt: skip
@option("Backbone", "--backbone", help="A timm model's name [default: the first task's backbone].")
@option("Backbone", "--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON value.")
@option("Output", "--html", type=_PATH, help="Write a report with pictures as one HTML file.")
@option(
    "Output", "--mistakes", default=24, show_default=True, type=click.IntRange(0), help="Most pictures in a gallery."
)
@option("Gate", "--min-top1", type=NumberRange(0, 100), metavar="PERCENT", help="Fail if top-1 is below this.")
@option("Gate", "--not-worse-than", metavar="TASK", help="Fail if top-1 is below this task's.")
@option(
    "Gate", "--by", type=NumberRange(0, 100), metavar="POINTS",
    help="With --not-worse-than: how many points of top-1 below are allowed [default: 0].",
)  # fmt: skip
@option("Gate", "--max-errors", type=click.IntRange(0), metavar="N", help="Fail if more than N images cannot be read.")
@option("Machine", "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Images per forward.")
@option("Machine", "--device", help="Device to compute on, such as cpu [default: cuda if there is one].")
@option(
    "Machine", "--dtype", default="float32", show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]), help="Precision of the forward.",
)  # fmt: skip
@allow_option
@version_option
def main(references: Sequence[str], **told: Any) -> None:
    """Measure how good TASK is on labelled images.

    TASK is a task of the store (dtd, dtd@2, dtd@prod), or a checkpoint: a file or a URL. Classes of the data and of the
    task are matched by their names. Several tasks are each compared with the first: which images changed, and whether
    that could be chance.

    With --min-top1, --not-worse-than or --max-errors the command is a gate. Exit codes: 0 all is well, 20 the gate
    failed, 1 another error, 2 wrong usage, 3 to 13 as for pear-store.

    \b
        pear-eval dtd --data my/pictures --html report.html
        pear-eval dtd@1 dtd@2 --data my/pictures
        pear-eval dtd --data my/pictures --not-worse-than dtd@prod --by 0.5
    """
    if told["by"] is not None and told["not_worse_than"] is None:
        raise click.UsageError("--by needs --not-worse-than: it says how far below that task top-1 may be")
    try:
        evaluation = _evaluate(references, told)
    except (PearTrainError, RouterError, PearStoreError) as error:
        say(f"Error: {error}")
        sys.exit(getattr(error, "exit_code", 1))
    except (MemoryError, torch.OutOfMemoryError) as error:
        say(f"Error: out of memory: try a smaller --batch-size; {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("Stopped: nothing was written.")
        sys.exit(130)
    if told["as_json"]:
        click.echo(json.dumps(evaluation.as_json(told["mistakes"]), allow_nan=False))
    else:
        show(evaluation)
    for check in evaluation.checks:
        echo(f"gate      {'met' if check.passed else 'NOT MET'}: {check.text}", err=True)
    reported = told["html"] is None or _report(evaluation, told["html"], told["mistakes"], Limits(told["max_pixels"]))
    sys.exit(GATE_FAILED if not evaluation.passed else 0 if reported else 1)


def _report(evaluation: Evaluation, path: Path, most: int, limits: Limits) -> bool:
    """Writes the report. Prints any failure in one line, because the figures are already printed."""
    try:
        write_report(evaluation, path, most, limits)
    except Exception as error:  # whatever Jinja, Pillow or a disk can raise
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"Error: {reason if isinstance(error, PearTrainError) else f'--html {path}: cannot be written: {reason}'}")
        return False
    echo(f"report    {path}", err=True)
    return True


def _evaluate(references: Sequence[str], told: Mapping[str, Any]) -> Evaluation:
    """Checks the request and does the work."""
    html: Path | None = told["html"]
    baseline: str | None = told["not_worse_than"]
    if html is not None:
        checkpoints = [reference for reference in (baseline, *references) if reference and is_checkpoint(reference)]
        inputs = [("--data", told["data"]), ("--weights", told["weights"]), ("--store", told["where"])]
        inputs += [("TASK", reference) for reference in checkpoints]
        try:
            check_apart([("--html", html)], [(option, Path(path)) for option, path in inputs if path is not None])
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        check_report(html)
    access = Access(allowed=frozenset(told["allowed"]))
    options = DataOptions(**{name: told[name] for name in DATA_OPTIONS if name in told})
    with ExitStack() as opened:

        @cache
        def store() -> ReadableStore:
            found = Store.open(told["where"], cache=CacheSettings(limit_bytes=told["cache_bytes"]))
            return opened.enter_context(found)

        subjects = find_subjects([*([baseline] if baseline is not None else []), *references], store, access)
        labelled = open_labelled(told["data"], told["data_root"], options, needs_train=False)
        sample = choose(labelled, told["split"], [subject.task for subject in subjects])
        if told["known_only"]:
            sample = sample.of_classes(set.intersection(*(set(subject.task.labels) for subject in subjects)))
            if not len(sample.images):
                raise DataError(
                    f"{sample.description}: --known-only leaves no image, because no class of the data is the task's: "
                    "give the task's data"
                )
        shown = [f"data      {sample.description}", f"images    {len(sample.images)}, split {sample.split}"]
        for line in [*shown, *(f"note      {note}" for note in sample.notes)]:
            echo(line, err=True)
        device = told["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        router = opened.enter_context(
            Router(
                told["backbone"] or subjects[0].task.backbone_model,
                store() if any(subject.version is not None for subject in subjects) else None,
                weights=told["weights"], device=device,
                dtype="auto" if told["dtype"] == "auto" else getattr(torch, told["dtype"]),
                max_pixels=options.max_pixels,
            )
        )  # fmt: skip
        for task in added(subjects):
            router.add(task)
        gate = Gate(
            told["min_top1"], subjects[0].shown if baseline is not None else None, told["by"] or 0.0, told["max_errors"]
        )
        with tqdm(total=len(sample.images), unit="image", file=sys.stderr, mininterval=0.5) as bar:
            evaluation = evaluate(router, subjects, sample, batch_size=told["batch_size"], gate=gate, tell=bar.update)
        for text in list(evaluation.answers.unreadable.values())[:_MOST_NAMES]:
            echo(f"Warning: {text}", err=True)
    return evaluation


def show(evaluation: Evaluation) -> None:
    """Prints the figures as tables."""
    tasks = evaluation.tasks
    errors = len(evaluation.answers.unreadable)
    count = f"{counted(len(evaluation.answers.rows), 'image')} evaluated"
    echo(count + (f", {errors} could not be read" if errors else ""))
    echo()
    echo_table([_summary(task) for task in tasks])
    for task in tasks:
        echo()
        _show_task(evaluation, task, alone=len(tasks) == 1)
    for comparison in evaluation.comparisons:
        echo()
        echo(f"from {comparison.before} to {comparison.after}: {changed(comparison)}")
        for what, places in (("better", comparison.better), ("worse", comparison.worse)):
            names = [evaluation.name(place) for place in places.tolist()]
            if names:
                more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
                echo(f"  {what}: {', '.join(names[:_MOST_NAMES])}{more}")


def _summary(task: Evaluated) -> dict[str, str]:
    found = task.figures
    return {
        "task": task.subject.shown,
        "top-1 %": _percent(found.top1),
        "95 % interval": f"{_percent(found.top1_low)} to {_percent(found.top1_high)}",
        **({"top-5 %": _percent(found.top5)} if found.top5 is not None else {}),
        "balanced %": _percent(found.balanced_accuracy),
        "macro F1 %": _percent(found.macro_f1),
        "ECE %": _percent(found.ece),
    }


def _show_task(evaluation: Evaluation, task: Evaluated, alone: bool) -> None:
    found = task.figures
    if not alone:
        echo(f"{task.subject.shown}:")
    classes = found.classes
    if len(classes) > _MOST_CLASSES:
        classes = sorted((one for one in classes if one.images), key=lambda one: one.f1 or 0.0)[:_MOST_CLASSES]
        echo(f"the {len(classes)} classes of {len(found.classes)} with the lowest F1; --json and --html have all")
    echo_table(
        [
            {
                "class": shown_label(one.label),
                "images": one.images,
                "precision %": _percent(one.precision),
                "recall %": _percent(one.recall),
                "F1 %": _percent(one.f1),
            }
            for one in classes
        ]
    )
    pairs = found.confused()[:_MOST_PAIRS]
    if pairs:
        echo()
        echo_table(
            [
                {"class": shown_label(was), "taken for": shown_label(taken), "times": count}
                for was, taken, count in pairs
            ],
            ["left", "left", "right"],
        )
    echo()
    echo_table(
        [
            {
                "answered above": f"{point.threshold:.2f}",
                "of the images %": _percent(point.coverage),
                "right %": _percent(point.accuracy),
            }
            for point in found.coverage
            if point.threshold in _THRESHOLDS
        ],
        ["right", "right", "right"],
    )
    places = task.mistakes(_MOST_NAMES).tolist()
    if places:
        echo()
        echo_table(
            [
                {"worst mistakes": evaluation.name(place), "class": shown_label(said["label"]),
                 "taken for": shown_label(said["predicted"]), "probability": f"{said['probability']:.3f}"}
                for place in places
                for said in [task.answer(place)]
            ],
            ["left", "left", "left", "right"],
        )  # fmt: skip


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
