#!/usr/bin/env python3
"""Tables and the plot of the study, from benchmarks/results/study.jsonl alone.

python benchmarks/study_report.py        # writes docs/results/study.md and study.png
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from study import GROUPS, RESULTS, SWEEP_SETS
from tabulate import tabulate

DOCS = Path(__file__).parents[1] / "docs" / "results"
CONTROLS = ("pear 0.75, random importance", "unpruned r=2")
"""Run last: on fewer sets than the others, maybe."""
PAIRS = (
    ("pear 0.5", "unpruned r=8"),
    ("pear 0.75", "unpruned r=8"),
    ("pear 0.75", "pear 0.75, random importance"),
    ("pear 0.75", "pear 0.75, no sharing"),
    ("pear 0.75", "unpruned r=2"),
    ("pear 0.75", "LoRA qkv r=2"),
    ("pear 0.75", "LoRA qkv r=8"),
    ("pear 0.5", "LoRA qkv r=8"),
    ("pear 0.75, qkv", "LoRA qkv r=2"),
    ("pear 0.75, qkv", "LoRA qkv r=8"),
    ("pear 0.5, qkv", "LoRA qkv r=8"),
)
Rows = dict[tuple[str, str, int], dict[str, Any]]


def images(row: dict[str, Any]) -> NDArray[np.float64]:
    """Which test images were right, [n]."""
    count, digits = row["right"].split(":")
    return np.array(list(f"{int(digits, 16):0{count}b}"), dtype=np.float64)


def complete(final: Rows, names: list[str], seeds: list[int]) -> list[str]:
    """The sets on which all of some methods were run with all seeds."""
    return [s for group in GROUPS.values() for s in group if all((n, s, k) in final for n in names for k in seeds)]


def difference(rows: Rows, a: str, b: str, sets: list[str], seeds: list[int]) -> tuple[float, float, float]:
    """Mean over sets of test top-1 of a minus b, in points, with its 95 % interval: paired, over images and seeds."""
    random = np.random.default_rng(0)
    pairs = {s: np.stack([images(rows[a, s, k]) - images(rows[b, s, k]) for k in seeds]) for s in sets}  # [seed, image]
    draws = []
    for _ in range(4000):
        chosen = random.integers(0, len(seeds), len(seeds))
        means = [one[chosen][:, random.integers(0, one.shape[1], one.shape[1])].mean() for one in pairs.values()]
        draws.append(np.mean(means))
    low, high = np.percentile(draws, [2.5, 97.5])
    return 100 * float(np.mean([one.mean() for one in pairs.values()])), 100 * float(low), 100 * float(high)


@click.command(help=__doc__)
@click.option("--results", type=click.Path(exists=True, path_type=Path), default=RESULTS)
@click.option("--out", type=click.Path(path_type=Path), default=DOCS)
def main(results: Path, out: Path) -> None:
    every = [json.loads(line) for line in results.read_text().splitlines()]
    final: Rows = {(r["name"], r["dataset"], r["seed"]): r for r in every if r["stage"] == "final"}
    names = list(dict.fromkeys(name for name, _, _ in final))
    seeds = sorted({seed for _, _, seed in final})
    main_names = [name for name in names if name not in CONTROLS]
    sets = complete(final, main_names, seeds)
    names = [name for name in names if set(sets) <= set(complete(final, [name], seeds))]
    (out / "study.md").write_text(text(every, final, names, sets, seeds))
    plot(final, names, sets, seeds, out / "study.png")
    click.echo(f"{out / 'study.md'}: {len(sets)} sets, {len(seeds)} seed(s)")


def text(every: list[dict[str, Any]], final: Rows, names: list[str], sets: list[str], seeds: list[int]) -> str:
    def top1(name: str, of: list[str]) -> float:
        return 100 * float(np.mean([final[name, s, k]["test_top1"] for s in of for k in seeds]))

    table = []
    for name in sorted(names, key=lambda name: top1(name, sets)):
        row: dict[str, Any] = {"method": name}
        for group, members in GROUPS.items():
            found = [s for s in members if s in sets]
            row[f"{group} ({len(found)})"] = f"{top1(name, found):.1f}" if found else "-"
        row[f"mean of {len(sets)}"] = f"{top1(name, sets):.2f}"
        for kind in ("adapter", "head"):
            row[f"{kind} bytes"] = f"{np.mean([final[name, s, k][f'{kind}_bytes'] for s in sets for k in seeds]):,.0f}"
        table.append(row)
    by_set = [
        {"method": name, **{s: f"{top1(name, [s]):.1f}" for s in sets}}
        for name in sorted(names, key=lambda n: top1(n, sets))
    ]
    differences = []
    for a, b in PAIRS:
        both = complete(final, [a, b], seeds)
        if both:
            mean, low, high = difference(final, a, b, both, seeds)
            interval = f"{low:+.2f} to {high:+.2f}"
            differences.append(
                {"difference": f"{a} − {b}", "sets": len(both), "points": f"{mean:+.2f}", "95 %": interval}
            )
    sweep: dict[str, dict[str, Any]] = defaultdict(dict)
    for r in every:
        if r["stage"] == "sweep":
            sweep[r["name"]][r["dataset"]] = r
    swept = []
    for name, rows in sweep.items():
        if len(rows) == len(SWEEP_SETS):
            swept.append({
                "pear_tiny, 10 epochs": name, **{s: f"{100 * rows[s]['val_top1']:.1f}" for s in SWEEP_SETS},
                "mean": f"{100 * np.mean([r['val_top1'] for r in rows.values()]):.2f}",
                "val loss": f"{np.mean([r['val_loss'] for r in rows.values()]):.3f}",
            })  # fmt: skip
    forms: dict[str, dict[str, Any]] = defaultdict(dict)
    for r in every:
        if r["stage"] == "sharing":
            forms[r["name"]][r["dataset"]] = r
    shared = [s for s in SWEEP_SETS if all(s in rows for rows in forms.values())]
    sharing = [
        {
            "a pruned position has": name,
            **{s: f"{100 * rows[s]['val_top1']:.1f}" for s in shared},
            "mean": f"{100 * np.mean([rows[s]['val_top1'] for s in shared]):.2f}",
            "val loss": f"{np.mean([rows[s]['val_loss'] for s in shared]):.3f}",
            "train loss": f"{np.mean([rows[s]['train_loss'] for s in shared]):.3f}",
            "bytes": f"{np.mean([rows[s]['adapter_bytes'] + rows[s]['knowledge_bytes'] for s in shared]):,.0f}",
        }
        for name, rows in forms.items()
        if shared
    ]
    one = next(iter(final.values()))

    def show(rows: list[dict[str, Any]]) -> str:
        return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)

    return f"""# The study: accuracy per byte

Written by `python benchmarks/study_report.py` from `benchmarks/results/study.jsonl`. Bytes are of float16 tensors, adapters with
their cores; the head comes on top, the same for all. Runs: {one["machine"]}, float32.

## Final table

Test top-1 in %, DeiT-tiny (ImageNet-1k) at 96 pixels, {one["options"]["epochs"]} epochs, {len(seeds)} seed(s), the last epoch, test looked at once.
{len(sets)} of 12 sets are run so far: {", ".join(sets)}. The linear probe has 60 epochs. Learning rates were chosen on val of
other runs (below), one for all sets: {", ".join(f"{n}: {next(r for (m, _, _), r in final.items() if m == n)['options']['lr']:g}" for n in names)}.

{show(table)}

![Mean test top-1 over adapter bytes](study.png)

{show(by_set)}

Differences with 95 % intervals from a paired bootstrap over test images{" and seeds" if len(seeds) > 1 else "; with one seed they do not hold the spread between seeds"}:

{show(differences)}

## What a pruned position has

pear_tiny, ratio 0.75, 10 epochs, learning rate 0.005, one seed, val (200 images a set: differences of a point are not
established; losses say more). All rows share the epochs before pruning.

{show(sharing)}

## Learning rates

Val top-1 in % (200 images a set, one seed), 24 or 12 block positions, rank 8 unless said; the last epoch.

{show(swept)}
"""  # noqa: E501


def plot(final: Rows, names: list[str], sets: list[str], seeds: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, title, kinds in zip(
        figure.subplots(1, 2, sharey=True),
        ("adapter bytes a task", "adapter and head bytes a task"),
        (("adapter_bytes", "knowledge_bytes"), ("adapter_bytes", "knowledge_bytes", "head_bytes")),
        strict=True,
    ):
        for name in names:
            rows = [final[name, s, k] for s in sets for k in seeds]
            size = np.mean([sum(r[kind] for kind in kinds) for r in rows]) / 1024
            top1 = 100 * np.mean([r["test_top1"] for r in rows])
            colour = "tab:green" if name.startswith("pear") and "," not in name else "tab:grey"
            axes.plot(size, top1, "o", color="tab:blue" if "LoRA" in name else colour)
            axes.annotate(name, (size, top1), fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.set_xlabel(f"{title}, KiB (float16)")
        axes.margins(x=0.25)
    figure.axes[0].set_ylabel(f"test top-1, %, mean of {len(sets)} sets")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
