"""Prints the command's results on stdout."""

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pear_store.terminal import echo, echo_table
from pear_train.plot import WHY_PASSED_OVER
from pear_train.recall import recall_rows
from pear_train.report import Failed, Result
from pear_train.tasks import TaskEntry

_OWN_BYTES = ("adapter_bytes", "knowledge_bytes", "head_bytes")
"""What a task adds to a store. Common bases are there once for all."""


def summary_line(result: Result | Failed) -> str:
    """One line for a task that ended."""
    if isinstance(result, Failed):
        return f"Error: {result.task}: {result.error}"
    return f"{result.task}: {_scores(result)}"


def answer_many(
    entries: list[TaskEntry],
    results: list[Result | Failed],
    kept: Container[str],
    paths: Mapping[str, Path],
    as_json: bool,
) -> None:
    """Prints a row for each task, in the order of the file.

    Args:
        kept: tasks whose checkpoint was already there.
    """
    by_task = {result.task: result for result in results}
    rows = list(_rows(entries, by_task, kept, paths))
    if as_json:
        click.echo(json.dumps(rows))
        return
    shown = [
        {
            "task": row["task"],
            "val %": "" if row["val_top1"] is None else f"{100 * row['val_top1']:.1f}",
            "test %": "" if row["test_top1"] is None else f"{100 * row['test_top1']:.1f}",
            "bytes": "" if "error" in row else f"{sum(row[part] for part in _OWN_BYTES):,}",
            "result": "failed, see above"
            if "error" in row
            else ("was trained already" if row["trained"] is False else f"{row['seconds']:.0f} s"),
        }
        for row in rows
    ]
    echo_table(shown, ["left"] * len(shown[0]))


def _rows(
    entries: list[TaskEntry], by_task: Mapping[str, Result | Failed], kept: Container[str], paths: Mapping[str, Path]
) -> Iterator[dict[str, Any]]:
    for entry in entries:
        result = by_task[entry.config.task]
        row: dict[str, Any] = {"task": result.task, "file": str(paths[result.task]), "trained": result.task not in kept}
        if isinstance(result, Failed):
            yield {**row, "trained": None, "val_top1": None, "test_top1": None, "error": result.error}
        else:
            yield {**row, **asdict(result)}


def answer_one(result: Result, out: Path, as_json: bool) -> None:
    """Prints a table of positions, a table of classes and the figures, or one JSON value."""
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    if result.importance:
        _show_positions(result)
    echo_table(recall := recall_rows(result.classes), ["left"] * len(recall[0]))
    echo(f"{result.task} ({result.method}): {_scores(result)}, {result.seconds:.0f} s")
    if result.threshold is not None:
        echo(f"threshold {result.threshold:.4f}: {_threshold_shown(result.threshold)}")
    echo(
        f"{click.format_filename(out)}: {result.file_bytes:,} bytes (adapters {result.adapter_bytes:,}, "
        f"knowledge {result.knowledge_bytes:,}, head {result.head_bytes:,}"
        + (f"; common bases {result.bases_bytes:,})" if result.bases_bytes else ")")
    )


def _show_positions(result: Result) -> None:
    peak = max(result.importance.values()) or 1.0
    rows = []
    for position, score in result.importance.items():
        uses = "own"
        if position in result.pruned:
            borrowed = [*([result.borrowed[position]] if position in result.borrowed else [])]
            borrowed += [f"bank {name}" for name in result.banked.get(position, [])]
            uses = f"pruned, borrows {', '.join(borrowed)}" if borrowed else "pruned"
            if result.bases_bytes:
                uses = "common bases alone"
            if position in result.passed_over:
                uses += " *"
        bar = "█" * max(1, round(20 * score / peak)) if score > 0 else ""
        rows.append({"position": position, "importance": f"{score / peak:.4f}", "": bar, "adapter": uses})
    echo_table(rows, ["left"] * len(rows[0]))
    echo("importance: how much the loss would change without the adapter, relative to the highest")
    if result.passed_over:
        echo(f"* {WHY_PASSED_OVER}")


def _scores(result: Result) -> str:
    test = "no test split" if result.test_top1 is None else f"test {100 * result.test_top1:.1f} %"
    return f"val {100 * result.val_top1:.1f} %, {test}"


def _threshold_shown(threshold: float) -> str:
    return "answers with less confidence count as unknown" if threshold else "all answers on val are right often enough"
