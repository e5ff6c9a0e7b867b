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
from study import BASES, GROUPS, RESULTS, SWEEP_SETS
from tabulate import tabulate

DOCS = Path(__file__).parents[1] / "docs" / "results"
PAIRS = (
    ("pear r=8, 0.5", "unpruned r=8"),
    ("pear r=8, 0.75", "unpruned r=8"),
    ("pear r=12, 0.92", "unpruned r=8"),
    ("pear r=12, 0.92", "LoRA qkv r=2"),
    ("pear r=8, 0.75", "LoRA qkv r=2"),
    ("pear r=12, 0.92", "LoRA qkv r=8"),
    ("pear r=8, 0.75", "LoRA qkv r=8"),
    ("pear r=8, 0.75", "pear r=8, 0.75, random importance"),
    ("pear r=8, 0.75", "pear r=8, 0.75, no sharing"),
    ("pear r=8, 0.75", "unpruned r=2"),
    ("pear r=12, 0.92", "pear r=12, 0.92, random importance"),
    ("pear r=12, 0.92", "pear r=12, 0.92, no sharing"),
    ("pear r=12, 0.92", "unpruned r=1"),
    ("pear r=12, 0.92", "unpruned r=2"),
    ("pear r=12, 0.92", "pear r=8, 0.75"),
    ("unpruned r=2", "LoRA qkv r=2"),
    ("LoRA qkv r=2, weight_decay 1", "LoRA qkv r=2"),
    ("LoRA qkv r=8, weight_decay 1", "LoRA qkv r=8"),
    ("pear r=12, 0.92", "LoRA qkv r=2, weight_decay 1"),
    ("pear r=12, 0.92", "LoRA qkv r=8, weight_decay 1"),
    ("pear r=12, 0.92, weight_decay 0.1", "pear r=12, 0.92"),
    ("pear r=12, 0.92, weight_decay 0.1", "LoRA qkv r=2, weight_decay 1"),
    ("pear r=12, 0.92, weight_decay 0.1", "LoRA qkv r=8, weight_decay 1"),
)
MARKERS = "os^vD<>Pp*hX8dH1234+x"
PEAR, CONTROL, LORA = "tab:green", "tab:grey", "tab:blue"
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
    final: Rows = {(r["name"], r["dataset"], r["seed"]): r for r in every if r["stage"] in ("final", "tuned")}
    seeds = sorted({seed for _, _, seed in final})
    found = {name: complete(final, [name], seeds) for name, _, _ in final}
    most = max(map(len, found.values()))
    names = [name for name, sets in found.items() if len(sets) == most]
    sets = complete(final, names, seeds)
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
        of = [k for k in seeds if len(complete(final, [a, b], [k])) == len(sets)]
        if of:
            mean, low, high = difference(final, a, b, sets, of)
            interval = f"{low:+.2f} to {high:+.2f}"
            differences.append(
                {"difference": f"{a} − {b}", "seeds": len(of), "points": f"{mean:+.2f}", "95 %": interval}
            )
    one = next(iter(final.values()))
    across, codes, large = table_across(every, final), table_codes(every, final), table_pixels(every)
    bases = [of for name, of in BASES.items() if name in {row["upon"] for row in across}]
    members = " and ".join(f"for {', '.join(of)}" if len(of) < len(sets) else "for all 12" for of in bases)

    def show(rows: list[dict[str, Any]]) -> str:
        return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) if rows else "Not run yet."

    return f"""# The study: accuracy per byte

Written by `python benchmarks/study_report.py` from `benchmarks/results/study.jsonl`. Bytes are of float16 tensors, adapters with
their cores; the head comes on top, the same for all. Runs: {one["machine"]}, bfloat16 autocast, gradients clipped at
norm 1, for peers as for ours.

## Final table

Test top-1 in %, DeiT-tiny (ImageNet-1k) at 96 pixels, {one["options"]["epochs"]} epochs, {len(seeds)} seed(s), the last epoch, test looked at once.
Sets: {", ".join(sets)}. The linear probe has 60 epochs. Learning rates were chosen on val of
other runs (below), one for all sets; weight decay is 1e-4, or in the rows that name it chosen on val too. Learning rates: {", ".join(f"{n}: {next(r for (m, _, _), r in final.items() if m == n)['options']['lr']:g}" for n in names)}.

{show(table)}

![Mean test top-1 over adapter bytes](study.png)

{show(by_set)}

Differences with 95 % intervals from a paired bootstrap over test images{" and seeds" if len(seeds) > 1 else "; with one seed they do not hold the spread between seeds"}:

{show(differences)}

## What a pruned position has

Rank 12, ratio 0.92, the rest as in the final table; one seed, val (200 images a set: differences of a point are not
established; losses say more). All rows but those scored otherwise share the epochs before pruning.

{show(sweep(every, "sharing", "a pruned position has"))}

## One option at a time

From the default (positions qkv,mlp, rank 12, ratio 0.92, lr 0.005), four sets, one seed, val. Rows that differ only after pruning share
the epochs before it.

{show(sweep(every, "knobs", "what is turned"))}

## Learning rate and weight decay together

Weight decay of the final table is 1e-4. The last rows of the table above and these turn it, for LoRA as for ours; val.

{show(sweep(every, "decay", "what"))}

## Forms of other papers

At about the default's bytes; from their papers, in a few lines of hooks (`benchmarks/study_peers.py`), without dropout and
drop path; val.

{show(sweep(every, "peers", "form"))}

## 224 pixels

Three sets, one seed, test; options as at 96 pixels, nothing tuned again. The intervals do not hold the spread between seeds.

{show(large)}

## Tasks upon others

The 12 tasks added one after another, rank 12, ratio 0.92, seed 0. Bank: pruned positions also borrow from the tasks before, in three
orders. Base: an adapter set trained {members} together, whose lowest four blocks all tasks share and keep
frozen. Differences with 95 % intervals over images and orders, not over seeds. New bytes: float16, what a store has to add, the head left out.

{show(across)}

## Few bits

The same at seed 0 with adapters trained as codes of 8, 4 or 1 bits and heads rounded to codes. The intervals do not hold the spread
between seeds.

{show(codes)}

## What was tried on val

Val top-1 in %, the last epoch, 200 images a set: a difference of two points between two rows may be the seed's. Named by positions, rank,
ratio, learning rate and what else differs from the final table's settings. These rows chose its positions, ranks and learning rates, for
peers as for ours.

{show(sweep(every, "shape", "what", "seed"))}
"""  # noqa: E501


def sweep(every: list[dict[str, Any]], stage: str, what: str, *more: str) -> list[dict[str, Any]]:
    """Every complete row of a stage that looks at val alone."""
    runs: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in every:
        if r["stage"] == stage:
            runs[r["name"], *(r[one] for one in more)][r["dataset"]] = r
    return [
        {
            **dict(zip((what, *more), key, strict=True)),
            **{s: f"{100 * rows[s]['val_top1']:.1f}" for s in SWEEP_SETS},
            "mean": f"{100 * np.mean([rows[s]['val_top1'] for s in SWEEP_SETS]):.2f}",
            "val loss": f"{np.mean([rows[s]['val_loss'] for s in SWEEP_SETS]):.3f}",
            "train loss": f"{np.mean([rows[s]['train_loss'] for s in SWEEP_SETS]):.3f}",
            "adapter bytes": f"{np.mean([r['adapter_bytes'] + r['knowledge_bytes'] for r in rows.values()]):,.0f}",
        }
        for key, rows in runs.items()
        if len(rows) == len(SWEEP_SETS)
    ]


def table_pixels(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test at 224 pixels."""
    rows: Rows = {(r["name"], r["dataset"], 0): r for r in every if r["stage"] == "pixels"}
    sets = sorted({s for _, s, _ in rows})
    table = []
    for name in complete_names(rows, sets):
        mean, low, high = difference(rows, "pear r=12, 0.92", name, sets, [0])
        table.append({
            "method": name, **{s: f"{100 * rows[name, s, 0]['test_top1']:.1f}" for s in sets},
            "mean": f"{100 * np.mean([rows[name, s, 0]['test_top1'] for s in sets]):.2f}",
            "pear r=12, 0.92 − it": f"{mean:+.2f} ({low:+.2f} to {high:+.2f})",
            "adapter bytes": f"{np.mean([rows[name, s, 0]['adapter_bytes'] for s in sets]):,.0f}",
        })  # fmt: skip
    return table


def table_codes(every: list[dict[str, Any]], final: Rows) -> list[dict[str, Any]]:
    """What few bits cost, beside float16."""
    sets = [s for group in GROUPS.values() for s in group]
    rows: Rows = {("float16", s, 0): final["pear r=12, 0.92", s, 0] for s in sets}
    rows |= {(r["name"], r["dataset"], 0): r for r in every if r["stage"] == "codes"}
    table = []
    for name in complete_names(rows, sets):
        mean, low, high = difference(rows, name, "float16", sets, [0])
        table.append({
            "tensors": name, "test top-1": f"{100 * np.mean([rows[name, s, 0]['test_top1'] for s in sets]):.2f}",
            "against float16": f"{mean:+.2f}", "95 %": f"{low:+.2f} to {high:+.2f}",
            **{f"{kind} bytes": f"{np.mean([rows[name, s, 0][f'{kind}_bytes'] for s in sets]):,.0f}"
               for kind in ("adapter", "head")},
        })  # fmt: skip
    return table


def complete_names(rows: Rows, sets: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(n for n, _, _ in rows) if all((name, s, 0) in rows for s in sets)]


def table_across(every: list[dict[str, Any]], final: Rows) -> list[dict[str, Any]]:
    """What a task costs and gains that comes upon others, beside the same task alone."""
    orders: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in every:
        if r["stage"] == "across":
            orders[r["name"]][r["dataset"]] = r
    sets = [s for group in GROUPS.values() for s in group]
    whole = {name: rows for name, rows in orders.items() if set(rows) == set(sets)}
    table = []
    for kind in dict.fromkeys(name.partition(",")[0] for name in whole):
        runs = [rows for name, rows in whole.items() if name.startswith(kind)]
        rows: Rows = {("with", s, k): run[s] for k, run in enumerate(runs) for s in sets}
        against = {}
        for other in ("pear r=12, 0.92", "unpruned r=8"):
            rows |= {(other, s, k): final[other, s, 0] for k in range(len(runs)) for s in sets}
            mean, low, high = difference(rows, "with", other, sets, list(range(len(runs))))
            against[f"− {other}, alone"] = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        fresh = {number: [r["new_adapter_bytes"] for run in runs for r in run.values() if r["number"] == number]
                 for number in range(1, len(sets) + 1)}  # fmt: skip
        saved = np.mean([r["compute_saved"] for run in runs for r in run.values() if r["number"] == len(sets)])
        table.append({
            "upon": kind, "runs of 12 tasks": len(runs),
            "test top-1": f"{100 * np.mean([r['test_top1'] for run in runs for r in run.values()]):.2f}",
            **against, **{f"new adapter bytes, task {n}": f"{np.mean(fresh[n]):,.0f}" for n in (1, 6, 12)},
            "run_all saves": f"{100 * saved:.1f} %",
        })  # fmt: skip
    return table


def plot(final: Rows, names: list[str], sets: list[str], seeds: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    top1 = {n: 100 * float(np.mean([final[n, s, k]["test_top1"] for s in sets for k in seeds])) for n in names}
    for axes, title, kinds in zip(
        figure.subplots(1, 2, sharey=True),
        ("adapter bytes a task", "adapter and head bytes a task"),
        (("adapter_bytes", "knowledge_bytes"), ("adapter_bytes", "knowledge_bytes", "head_bytes")),
        strict=True,
    ):
        for name, marker in zip(sorted(set(names) - {"linear"}, key=lambda n: -top1[n]), MARKERS, strict=False):
            rows = [final[name, s, k] for s in sets for k in seeds]
            size = np.mean([sum(r[kind] for kind in kinds) for r in rows]) / 1024
            control = name.startswith("unpruned") or name.endswith(("random importance", "no sharing"))
            colour = LORA if "LoRA" in name else CONTROL if control else PEAR
            axes.plot(size, top1[name], marker, color=colour, label=name if axes is figure.axes[0] else None)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{title}, KiB (float16)")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"test top-1, %, mean of {len(sets)} sets\n(a linear probe: {top1['linear']:.1f})")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
