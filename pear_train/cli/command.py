"""The command itself: its options, and its output at the end."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from pear_store import PearStoreError
from pear_store.terminal import NamedPath, version_option
from pear_train.cli.answer import answer_many, answer_one
from pear_train.cli.cluster import find_cluster
from pear_train.cli.options import ARGUMENTS, HeadedCommand, option, read_options, run_option
from pear_train.cli.progress import as_command, say
from pear_train.cli.request import Request, Stopped, Work
from pear_train.cli.work import do_work
from pear_train.errors import PearTrainError
from pear_train.html import write_html
from pear_train.plot import plot_path, plot_result
from pear_train.report import Result
from router import RouterError

_PATH = NamedPath(path_type=Path)
_DRAWN = ("plot", "html", "preview", "curves")


@click.command(cls=HeadedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("task", required=False)
@option(
    "Data",
    "--data",
    help="Image folder, list of images (.csv, .jsonl, .parquet), folder of Hugging Face datasets, VTAB-1k folder, .npz "
    "file, or a data set's name in timm.",
)
@option("Data", "--data-root", type=_PATH, help="Folder of named data sets. They are downloaded to it.")
@run_option("Data", "--train-split", "Folder of the train split [default: recognised by its name].")
@run_option("Data", "--val-split", "Folder of the val split; none: take a tenth of train.")
@run_option("Data", "--test-split", "Folder of the test split; none: there is no test split.")
@run_option("Data", "--no-splits", "The folders are classes, even if they are called train or test.")
@run_option("Data", "--skip-unreadable", "Leave out pictures that cannot be read [default: refuse the data].")
@run_option("Data", "--max-pixels", "Refuse pictures with more pixels, before they are decoded.")
@option("Backbone", "--backbone", default="pear_tiny", show_default=True, help="A timm model's name.")
@option("Backbone", "--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@run_option("Backbone", "--img-size", "Height and width of the input in pixels [default: the backbone's own].")
@run_option("Method", "--method", "pear: prune and share. adapters: keep all. linear: train the head only.")
@run_option(
    "Method", "--positions", "Where adapters are: auto, or comma-separated presets (blocks, attn, mlp, qkv, linear, "
    "whole, pointwise) and patterns. A task with linear can be merged, and exported to timm and PEFT. It then takes "
    "2.5 times the bytes.",
)  # fmt: skip
@run_option("Method", "--rank", "Rank of an adapter.")
@run_option("Method", "--ratio", "Share of the adapters that is pruned.")
@run_option("Training", "--epochs", "Number of epochs.")
@run_option("Training", "--lr", "Highest learning rate.")
@run_option("Training", "--weight-decay", "AdamW's weight decay.")
@run_option("Training", "--warmup", "Share of the steps in which the learning rate rises.")
@run_option("Training", "--batch-size", "Images per step.")
@run_option(
    "Training", "--augment", "Random changes of training images: flip, crop, rotate, zoom, color or mixup. + joins "
    "several. Each helps some tasks and harms others.",
)  # fmt: skip
@run_option("Training", "--balance", "For rare classes: they weigh more in the loss (weights), or come more often.")
@run_option("Training", "--label-smoothing", "Share of each label that is spread over all classes, such as 0.1.")
@run_option("Training", "--select", "Epoch to keep: best top-1 on val (best), best macro F1 on val, or last.")
@run_option("Training", "--patience", "Stop when val has not improved for this many epochs.")
@run_option(
    "Training", "--threshold-accuracy", "Store a threshold: the lowest confidence at which this share of answers on "
    "val is right, such as 0.95.",
)  # fmt: skip
@run_option("Training", "--seed", "Seed of every random choice.")
@option("Several tasks", "--tasks", "tasks_file", type=_PATH, help="TOML file of many tasks, instead of TASK.")
@option(
    "Several tasks", "--together", type=click.IntRange(1),
    help="How many of --tasks to train at once [default: 8 on a GPU, else 1].",
)  # fmt: skip
@option(
    "Several tasks", "--ray", "address", metavar="[ADDRESS]", is_flag=False, flag_value="local",
    help="Train --tasks on the Ray cluster at ADDRESS, such as auto or 10.0.0.1:6379. Without ADDRESS: on this machine "
    "alone.",
)  # fmt: skip
@option(
    "Several tasks", "--workers", type=click.IntRange(1),
    help="With --ray: the most workers at once [default: as many as the cluster has room for].",
)  # fmt: skip
@option(
    "Several tasks", "--cpus-per-worker", type=click.IntRange(1),
    help="With --ray: cores of each worker [default: 4, or as many as the smallest machine has; 1 with a GPU].",
)  # fmt: skip
@option("Sharing between tasks", "--bank", type=_PATH, help="Store whose adapters pruned positions may borrow.")
@option("Sharing between tasks", "--bank-tasks", help="Comma-separated tasks of --bank [default: the 64 added last].")
@option("Sharing between tasks", "--base", type=_PATH, help="Base set to start from, made by --make-base.")
@run_option("Sharing between tasks", "--base-blocks", "How many of the lowest blocks use --base frozen.")
@option(
    "Sharing between tasks", "--make-base", is_flag=True,
    help="Train one adapter set for all of --tasks, and write it as a base set.",
)  # fmt: skip
@option("Sharing between tasks", "--bases", help="Common bases to train cores in: a file, or a name in --from-store.")
@option(
    "Sharing between tasks", "--rebase",
    help="Task to move to --bases without training: a file, or a name in --from-store. Prints top-1 before and after.",
)  # fmt: skip
@option(
    "Output", "--round",
    help="Task to write in --tensor-dtype, --core-dtype or --head-dtype without training: a file, or a name in "
    "--from-store. Prints top-1 before and after.",
)  # fmt: skip
@run_option("Sharing between tasks", "--own-rank", "Rank of a task's own adapters beside its cores.")
@run_option(
    "Sharing between tasks", "--own-bytes", "Bytes for a task's own adapters. The most important that fit are kept."
)
@option(
    "Sharing between tasks", "--make-bases", is_flag=True,
    help="Make common bases of --rank from the tasks of --from-store, from the data of --tasks, from both, or "
    "--from-backbone.",
)  # fmt: skip
@option(
    "Sharing between tasks", "--from-backbone", is_flag=True,
    help="Make common bases from the backbone's own weights. This needs no task and no data.",
)  # fmt: skip
@option(
    "Sharing between tasks",
    "--from-store",
    type=_PATH,
    help="Store of the tasks for --make-bases, or of --bases or --round.",
)
@option(
    "Sharing between tasks", "--from-tasks", help="Comma-separated tasks of --from-store [default: the 64 added last]."
)
@option(
    "Output", "--out", type=_PATH, required=True,
    help="Task checkpoint to write. With --tasks: a folder, which is made if it is missing.",
)  # fmt: skip
@option(
    "Output", "--overwrite", is_flag=True,
    help="Replace files at --out that a run with other options or data wrote [default: refuse].",
)  # fmt: skip
@option("Output", "--force", is_flag=True, help="Train again and replace any task checkpoint at --out.")
@run_option(
    "Output", "--tensor-dtype", "Number format of written adapters. Q8, Q4, Q2 and Q1 are codes of 8, 4, 2 and 1 bits."
)
@run_option("Output", "--core-dtype", "Number format of written cores.")
@run_option("Output", "--head-dtype", "Number format of the written head.")
@option("Output", "--plot", is_flag=True, help="Draw importance and learning curve to a .png file beside --out.")
@option("Output", "--html", type=_PATH, help="Write a report as one HTML file.")
@option("Output", "--preview", type=_PATH, help="Draw training pictures, as the network sees them, to this .png file.")
@option("Output", "--curves", type=_PATH, help="Write loss and accuracies of each epoch to this .csv file.")
@option("Output", "--tensorboard", type=_PATH, help="Write them to this folder for TensorBoard, too. Not with --ray.")
@option("Output", "--json", "as_json", is_flag=True, help="Print one JSON value.")
@run_option("Machine", "--device", "Device to compute on, such as cpu [default: cuda if there is one].")
@run_option("Machine", "--dtype", "Precision of training.")
@option(
    "Other", "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="Set any option of a run, by its name in a file of tasks. May be repeated. Only this sets prune_epoch, "
    "activation, scale, down, importance, sharing, borrow, borrowed_scale, train_borrowed_scale, scale_lr, knowledge, "
    "knowledge_bits, max_grad_norm, drop_branch, bank_share, core_lr and bases_lr.",
)  # fmt: skip
@version_option
@click.pass_context
def main(ctx: click.Context, /, settings: Sequence[str], **told: Any) -> None:
    """Train TASK: pruned and shared adapters on a frozen backbone. Write it as one task checkpoint.

    With --tasks FILE, train every task that FILE names into the folder --out. A task is not trained again if its
    checkpoint, with the same options and data, is already there. A checkpoint with other options or data is refused. An
    interrupted run resumes after its last whole epoch.

    With --make-bases, make common bases from the backbone, stored tasks or data, and call them TASK. With --bases,
    train TASK as cores in these bases; --own-rank and --own-bytes allow it adapters of its own. With --rebase, move a
    trained task to other bases. With --round, write a trained task in other number formats.
    """
    request = Request(**{asked.name: told[asked.name] for asked in fields(Request)})
    _check_usage(request)
    try:
        work = do_work(request, read_options(ctx, settings))
    except (PearTrainError, RouterError, PearStoreError) as error:
        say(f"Error: {error}")
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt as stop:
        if not isinstance(stop, Stopped):
            how = "nothing was written; the same command again"
        elif stop.left_behind:
            how = f"{stop.left_behind}; the same command resumes from there"
            how += (
                ", and trains finished tasks anew (--force)"
                if request.force and (request.many or request.make_bases)
                else ""
            )
        else:
            how = "no epoch had ended; the same command starts anew"
        say(f"Stopped: {how}:\n    {as_command('pear-train', *ctx.meta.get(ARGUMENTS, []))}")
        sys.exit(130)
    if work is not None:
        _answer(request, work)


def _check_usage(request: Request) -> None:
    """Refuses options that would have no effect."""
    task, tasks_file = request.task, request.tasks_file
    if request.make_bases or request.from_tasks is not None or request.bases is not None:
        _check_bases_usage(request)
    if request.rebase is not None and request.bases is None:
        raise click.UsageError("--rebase needs --bases: it says which bases the task moves to")
    if request.round is not None:
        _check_round_usage(request)
    if request.from_backbone and not request.make_bases:
        raise click.UsageError("--from-backbone needs --make-bases: it says what bases are made from")
    if request.from_store is not None and not request.make_bases and request.bases is None and request.round is None:
        raise click.UsageError("--from-store needs --make-bases, --bases or --round: it says which store these read")
    if request.make_bases:
        return
    if (task is None) == (tasks_file is None) or (task is None) != (request.data is None):
        raise click.UsageError("expected either TASK with --data, or --tasks")
    if request.make_base and tasks_file is None:
        raise click.UsageError("--make-base needs --tasks")
    if request.together is not None and not request.many:
        raise click.UsageError("--together needs --tasks, and no --make-base: it says how many tasks train at once")
    if request.address is not None and not request.many:
        raise click.UsageError("--ray needs --tasks, and no --make-base: machines train different tasks")
    if request.address is not None and request.tensorboard is not None:
        raise click.UsageError("--ray takes no --tensorboard: epochs end on other machines")
    if request.address is not None:
        find_cluster()  # a missing ray shows now, before data is read and a folder made
    if request.address is None and (request.workers or request.cpus_per_worker):
        raise click.UsageError("--workers and --cpus-per-worker are for a cluster: give --ray, too")
    if request.bank_tasks is not None and request.bank is None:
        raise click.UsageError("--bank-tasks needs --bank: it names tasks of that store")
    unused = [f"--{name}" for name in ("base", "bank", *_DRAWN, "tensorboard") if getattr(request, name)]
    if request.make_base and unused:
        raise click.UsageError(f"--make-base takes no {' or '.join(unused)}")
    of_one = [f"--{name}" for name in ("html", "preview", "curves") if getattr(request, name)]
    if request.many and of_one:
        raise click.UsageError(f"{' and '.join(of_one)}: only for one task; --tasks takes --plot and --tensorboard")


def _check_bases_usage(request: Request) -> None:
    if request.make_bases:
        of = {"--from-store": request.from_store, "--from-tasks": request.from_tasks, "--tasks": request.tasks_file}
        if request.from_backbone and (others := [name for name, value in of.items() if value is not None]):
            raise click.UsageError(f"--from-backbone takes no {' or '.join(others)}: no task and no data are read")
        if not request.from_backbone and request.from_store is None and request.tasks_file is None:
            raise click.UsageError(
                "--make-bases needs --from-store, the store of the tasks that they are made from, --tasks, the data "
                "that they are trained on, or --from-backbone"
            )
        if request.from_store is None and request.from_tasks is not None:
            raise click.UsageError("--from-tasks needs --from-store: it names tasks of that store")
        names = ("base", "bank", "bank_tasks", "bases", "rebase", "round", "make_base", *_DRAWN, "tensorboard", "data",
                 "together", "address", "workers", "cpus_per_worker")  # fmt: skip
        flags = {"address": "ray"}
        if unused := [f"--{flags.get(name, name).replace('_', '-')}" for name in names if getattr(request, name)]:
            raise click.UsageError(f"--make-bases takes no {' or '.join(unused)}")
    elif request.from_tasks is not None:
        raise click.UsageError("--from-tasks needs --make-bases: it names tasks of --from-store")
    elif request.rebase is not None and (
        unused := [name for name in ("tasks_file", *_DRAWN, "tensorboard") if getattr(request, name)]
    ):
        raise click.UsageError(f"--rebase takes no --{unused[0].removesuffix('_file')}: it moves one task")
    elif unused := [f"--{name.replace('_', '-')}" for name in ("base", "bank", "make_base") if getattr(request, name)]:
        raise click.UsageError(f"--bases takes no {' or '.join(unused)}")


def _check_round_usage(request: Request) -> None:
    names = ("tasks_file", "base", "bank", "bases", "rebase", "make_base", *_DRAWN, "tensorboard")
    if unused := [name for name in names if getattr(request, name)]:
        shown = unused[0].removesuffix("_file").replace("_", "-")
        raise click.UsageError(f"--round takes no --{shown}: it only writes one task anew")


def _answer(request: Request, work: Work) -> None:
    """Prints results, then draws pictures. Exits with 1 if a task or a picture failed."""
    if request.many:
        answer_many(work.entries, work.results, work.kept, work.paths, request.as_json)
    else:
        assert isinstance(work.results[0], Result)
        answer_one(work.results[0], request.out, request.as_json)
    trained = [result for result in work.results if isinstance(result, Result)]
    for result in trained:
        if request.plot:
            work.draw(f"{result.task}: --plot", partial(plot_result, result, plot_path(work.paths[result.task])), say)
        if request.html is not None:
            work.draw(f"{result.task}: --html", partial(write_html, result, request.out, request.html), say)
    if len(trained) < len(work.results) or not work.drawn:
        sys.exit(1)
