#!/usr/bin/env python3
"""Tables and the plot of the study, from benchmarks/results/study.jsonl alone.

python -m benchmarks.study.report        # writes docs/results/study.md and study.png
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.study.bases import FOLDS, OWN, RECIPE, REPEATED
from benchmarks.study.run import GROUPS, RESULTS, SETS, SWEEP_SETS, UPON, plan_of, plans_upon

DOCS = Path(__file__).parents[2] / "docs" / "results"
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
    ("pear r=12, 0.92", "pear r=12, 0.92, random importance"),
    ("pear r=12, 0.92", "pear r=12, 0.92, no sharing"),
    ("pear r=12, 0.92", "unpruned r=1"),
    ("pear r=12, 0.92", "unpruned r=2"),
    ("pear r=8, 0.75", "unpruned r=2"),
    ("pear r=12, 0.92", "pear r=8, 0.75"),
    ("unpruned r=2", "LoRA qkv r=2"),
    ("unpruned r=8", "LoRA qkv r=8"),
)
PEERS = {
    "qkv,mlp r=12, pear 0.92": "pear r=12, 0.92",
    "qkv,mlp r=8, unpruned": "unpruned r=8",
    "qkv,mlp r=2, unpruned": "unpruned r=2",
    "qkv,mlp r=1, unpruned": "unpruned r=1",
    "mlp r=4, unpruned, activation relu": "AdaptFormer, r=4",
    **{name: name for name in (
        "LoRA qkv r=2", "LoRA qkv r=8", "LoRA all Linears r=1", "LoRA all Linears r=2", "VeRA qkv r=64", "VB-LoRA r=4",
        "RepAdapter, r=2", "FacT-TT, r=10", "Adapter+, r=3", "full fine-tuning")},
}  # fmt: skip
"""What the plot of all peers shows, by its name in the sweeps."""
SIZES = ("adapter", "knowledge", "head")
MARKERS = "os^vD<>Pp*hX8dH1234+x"
PEAR, CONTROL, PEER = "tab:green", "tab:grey", "tab:blue"
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
    table, final = (Standings(every, stage) for stage in ("table", "final"))
    (out / "study.md").write_text(text(every, table, final))
    probe = f"(a linear probe: {table.top1('linear'):.1f})"
    plot(points(table), f"test top-1, %, mean of {len(table.sets)} sets\n{probe}", out / "study.png")
    plot(points_of_peers(every), f"val top-1, %, mean of {len(SWEEP_SETS)} sets, one seed", out / "study_peers.png")
    click.echo(f"{out / 'study.md'}: {len(table.sets)} sets, {len(table.seeds)} seed(s)")


class Standings:
    """A stage that looks at test: methods that were run on most sets, and the seeds that all of them have."""

    def __init__(self, every: list[dict[str, Any]], stage: str) -> None:
        self.rows: Rows = {(r["name"], r["dataset"], r["seed"]): r for r in every if r["stage"] == stage}
        every_seed = sorted({seed for _, _, seed in self.rows})
        first = {name: len(complete(self.rows, [name], every_seed[:1])) for name, _, _ in self.rows}
        whole = [name for name, count in first.items() if count == max(first.values())]
        self.seeds = [k for k in every_seed if len(complete(self.rows, whole, [k])) == max(first.values())]
        found = {name: complete(self.rows, [name], self.seeds) for name, _, _ in self.rows}
        most = max(map(len, found.values()))
        self.sets = next(sets for sets in found.values() if len(sets) == most)
        self.names = sorted((n for n, sets in found.items() if len(sets) == most), key=self.top1)

    def top1(self, name: str, of: list[str] | None = None) -> float:
        """Mean test top-1 in %."""
        return 100 * float(np.mean([self.rows[name, s, k]["test_top1"] for s in of or self.sets for k in self.seeds]))

    def size(self, name: str, *kinds: str) -> float:
        """Mean bytes a task."""
        rows = [self.rows[name, s, k] for s in self.sets for k in self.seeds]
        return float(np.mean([sum(row[f"{kind}_bytes"] for kind in kinds) for row in rows]))

    def option(self, name: str, option: str, default: float) -> float:
        return float(next(r for (n, _, _), r in self.rows.items() if n == name)["options"].get(option, default))

    def table(self) -> list[dict[str, Any]]:
        rows = []
        for name in self.names:
            row: dict[str, Any] = {"method": name}
            for group, members in GROUPS.items():
                found = [s for s in members if s in self.sets]
                row[f"{group} ({len(found)})"] = f"{self.top1(name, found):.1f}" if found else "-"
            row[f"mean of {len(self.sets)}"] = f"{self.top1(name):.2f}"
            row["adapter bytes"] = f"{self.size(name, 'adapter', 'knowledge'):,.0f}"
            row["head bytes"] = f"{self.size(name, 'head'):,.0f}"
            row["lr"] = f"{self.option(name, 'lr', 0):g}"
            row["weight decay"] = f"{self.option(name, 'weight_decay', 1e-4):g}"
            row["warm-up"] = f"{self.option(name, 'warmup', 0.1):g}"
            rows.append(row)
        return rows

    def by_set(self) -> list[dict[str, Any]]:
        return [{"method": n, **{s: f"{self.top1(n, [s]):.1f}" for s in self.sets}} for n in self.names]

    def differences(self) -> list[dict[str, Any]]:
        found = []
        for a, b in PAIRS:
            if a in self.names and b in self.names:
                mean, low, high = difference(self.rows, a, b, self.sets, self.seeds)
                interval = f"{low:+.2f} to {high:+.2f}"
                found.append({"difference": f"{a} − {b}", "points": f"{mean:+.2f}", "95 %": interval})
        return found


def text(every: list[dict[str, Any]], best: Standings, final: Standings) -> str:
    one = next(iter(best.rows.values()))
    across = table_across(every, best.rows, True) + table_across(every, final.rows, False)
    codes, large = table_codes(every, final.rows), table_pixels(every)
    afterwards = table_rounded(every)
    seeds = seeds_of_bases(rows_of_bases(every))
    on_bases, score = table_bases(every, best.rows, seeds), table_score(every)
    on_bases_once = table_bases(every, best.rows, [0]) if len(seeds) > 1 else []

    def show(rows: list[dict[str, Any]]) -> str:
        return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) if rows else "Not run yet."

    return f"""# The study: accuracy per byte

Written by `python -m benchmarks.study.report` from `benchmarks/results/study.jsonl`. Bytes are those of adapters with their cores,
as float16 tensors. The head is not counted, and has the same size for all. Peers ran in the same way as Pear. Gradients were clipped at norm 1.

Machine and precision: {one["machine"]}, bfloat16 autocast{exceptions(every)}.

## Final table

The table has test top-1 in %, of DeiT-tiny (ImageNet-1k) at 96 pixels, with {one["options"]["epochs"]} epochs, {len(best.seeds)} seed(s). The last epoch is evaluated, and test was looked at once.
The sets are {", ".join(best.sets)}.

Learning rate, weight decay and warm-up were chosen by the mean val top-1 of all 12 sets at seed 0 (below). Each choice holds for all sets. Pear r=12 0.92 and
LoRA had six tries each, unpruned r=8 had five, and the others two or three. Pear's controls have Pear's choice, and Pear r=8 has that of unpruned r=8. The
linear probe has 60 epochs.

{show(best.table())}

![Mean test top-1 over adapter bytes](study.png)

{show(best.by_set())}

Differences with 95 % intervals from a paired bootstrap over test images{" and seeds" if len(best.seeds) > 1 else "; with one seed they do not hold the spread between seeds"}:

{show(best.differences())}

## How the table's options were chosen

The table has val of 12 sets at seed 0, after the last epoch (200 images a set).

{show(recipes(every))}

## The same with a weight decay of 1e-4

{len(final.seeds)} seed(s) were run for this earlier table. Learning rates were chosen on val of four sets. Nobody chose weight decay and warm-up (0.1), neither for peers nor
for Pear. Test was looked at again for the table above. Its options were chosen on val alone.

{show(final.table())}

{show(final.differences())}

## What a pruned position has

Rank is 12, ratio is 0.92, and the rest is as in the earlier table (learning rate 0.005, weight decay 1e-4, warm-up 0.1). It is val with one seed. With 200
images a set, differences of a point are not established, and losses say more. All rows share the epochs before pruning, but for those with another score.

{show(sweep(every, "sharing", "a pruned position has"))}

## One option at a time

Each row changes one option of the earlier default (positions qkv,mlp, rank 12, ratio 0.92, lr 0.005, weight decay 1e-4, warm-up 0.1). It is val of four
sets, with one seed. Rows that differ only after pruning share the epochs before it.

{show(sweep(every, "knobs", "what is turned"))}

## How adapters start, and q and v alone

This is Pear r=12 0.92 as in the final table, on val of four sets with one seed. By default `down` is uniform in ±1/√d_in and `up` is 0. A random `up` is
normal, with a tenth of `down`'s deviation. With q and v alone, k's columns of `up` at the fused qkv stay 0. Bytes are as written, with the zeros.

{show(sweep(every, "init", "start"))}

## Learning rate and weight decay together

These are the first tries, on val of four sets. The last rows of the table "One option at a time" and these change weight decay, for LoRA as for Pear.

{show(sweep(every, "decay", "what"))}

## Forms of other papers

These forms are written after their papers, in a few lines of hooks (`benchmarks/study/peers.py`), without dropout and drop path. They have about as many
bytes as the default. The table has val. The plot shows all peers, each with the best of its learning rates (one to three, weight decay 1e-4, warm-up 0.1).

![Mean val top-1 of four sets over adapter bytes, all peers](study_peers.png)

{show(sweep(every, "peers", "form"))}

## 224 pixels

This is test of three sets with one seed. Options are those of the final table at 96 pixels, and nothing was tuned again. The intervals do not hold the spread
between seeds.

{show(large)}

## Tasks upon others

The 12 tasks were added one after another, as Pear r=12 0.92 of the final table, with seed 0. "Earlier options" are those of the earlier table, beside its rows.

- **Bank**: pruned positions also borrow from the tasks before, in three orders.
- **Base**: an adapter set is trained for all 12 tasks together, or for four of them (a task of each group: {", ".join(UPON["base of 4 tasks"].base)}). All tasks share its lowest
  four blocks and keep them frozen. In higher blocks they start from it.

Differences have 95 % intervals over images and orders, not over seeds. New bytes are float16 tensors that a store has to add, without the head.

{show(across)}

## Common bases

Bases are made from the unpruned adapters of eight sets. Tasks are on the four sets that had no part in them. "Random" means random orthonormal bases.
"Backbone" means the first singular vectors of each Linear's own weight, from no task: LoRA-XS, by pear-train, with {RECIPE["warmup"]:g} of warm-up.
"Afterwards" means that cores and head of the row above were rounded to codes after training. Options are those of a first try on four sets, and nothing was
tuned for a row. Bases are not counted, because they are stored once for all tasks. Only complete rows are shown.

{show(on_bases)}
{also_once(on_bases_once, show)}
The next table has own parts beside the cores. They are placed by the importance score, at random, and in the first blocks. It is test, on the sets and seeds that
have all three. Intervals are over images and seeds.

{show(score)}

## Few bits

This is the same at seed 0. Adapters are trained as codes of 8, 4 or 1 bits, and heads are rounded to codes. The intervals do not hold the spread between seeds.

{show(codes)}

The next table is of tasks that were rounded after training, as `pear-train --round` does it, beside the same runs without it. Options are the final table's.

{show(afterwards)}

## What was tried on val

The table has val top-1 in % after the last epoch, with 200 images a set. A difference of two points between two rows may come from the seed. A row's name has
positions, rank, ratio, learning rate, and what else differs from the earlier table's settings. These rows chose that table's positions, ranks and learning
rates, for peers as for Pear.

{show(sweep(every, "shape", "what", "seed"))}
"""  # noqa: E501 (Markdown, as wide as the other documents)


def also_once(rows: list[dict[str, Any]], show: Callable[[list[dict[str, Any]]], str]) -> str:
    return f"\nSeed 0 alone, with the rows that have only this one:\n\n{show(rows)}\n" if rows else ""


def recipes(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Val of learning rates, weight decays and warm-ups on all sets at seed 0; earlier tables' rows, too."""
    wanted = {r["name"].partition(", lr")[0] for r in every if r["stage"] == "recipe"}
    runs: dict[tuple[str, float, float, float], dict[str, dict[str, Any]]] = defaultdict(dict)
    for r in every:
        name = r["name"].partition(", lr")[0].partition(", weight_decay")[0]
        if r["seed"] == 0 and name in wanted and r["stage"] in ("recipe", "final", "tuned"):
            options = r["options"]
            key = (name, options["lr"], options.get("weight_decay", 1e-4), options.get("warmup", 0.1))
            runs[key][r["dataset"]] = r
    every_set = [s for group in GROUPS.values() for s in group]
    return [
        {
            "method": name, "lr": f"{lr:g}", "weight decay": f"{decay:g}", "warm-up": f"{warmup:g}",
            "val top-1": f"{100 * np.mean([row['val_top1'] for row in rows.values()]):.2f}",
            "val loss": f"{np.mean([row['val_loss'] for row in rows.values()]):.3f}",
            "train loss": f"{np.mean([row['train_loss'] for row in rows.values()]):.3f}",
        }
        for (name, lr, decay, warmup), rows in sorted(runs.items())
        if len(rows) == len(every_set)
    ]  # fmt: skip


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


def table_rounded(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What it costs to round a finished task, beside the same run as it was trained."""
    rows: Rows = {(r["name"], r["dataset"], r["seed"]): r for r in every if r["stage"] == "rounded"}
    table = []
    for name in complete_names(rows, list(SETS)):
        trained = f"{name.partition(':')[0]}: as trained"
        points, low, high = difference(rows, name, trained, list(SETS), [0])
        table.append({
            "task": name, "test top-1": f"{100 * np.mean([rows[name, s, 0]['test_top1'] for s in SETS]):.2f}",
            **({} if name == trained else {"against it": f"{points:+.2f}", "95 %": f"{low:+.2f} to {high:+.2f}"}),
            **{f"{kind} bytes": f"{np.mean([rows[name, s, 0][f'{kind}_bytes'] for s in SETS]):,.0f}"
               for kind in ("adapter", "head")},
        })  # fmt: skip
    return table


def complete_names(rows: Rows, sets: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(n for n, _, _ in rows) if all((name, s, 0) in rows for s in sets)]


def table_across(every: list[dict[str, Any]], alone: Rows, now: bool) -> list[dict[str, Any]]:
    """What a task costs and gains that comes upon others, beside the same task alone; `now`: with the options that the
    final table has, else with those that an earlier one had."""
    orders: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    wanted = {plan.key for name in UPON for plan in plans_upon(name)}
    for r in every:
        if r["stage"] == "across" and (plan_of(r).key in wanted) == now:
            orders[r["name"]][r["dataset"]] = r
    sets = [s for group in GROUPS.values() for s in group]
    whole = {name: rows for name, rows in orders.items() if set(rows) == set(sets)}
    table = []
    for kind in dict.fromkeys(name.partition(",")[0] for name in whole):
        runs = [rows for name, rows in whole.items() if name.startswith(kind)]
        rows: Rows = {("with", s, k): run[s] for k, run in enumerate(runs) for s in sets}
        against = {}
        for other in ("pear r=12, 0.92", "unpruned r=8"):
            rows |= {(other, s, k): alone[other, s, 0] for k in range(len(runs)) for s in sets}
            mean, low, high = difference(rows, "with", other, sets, list(range(len(runs))))
            against[f"− {other}, alone"] = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        fresh = {number: [r["new_adapter_bytes"] for run in runs for r in run.values() if r["number"] == number]
                 for number in range(1, len(sets) + 1)}  # fmt: skip
        saved = np.mean([r["compute_saved"] for run in runs for r in run.values() if r["number"] == len(sets)])
        table.append({
            "upon": kind if now else f"{kind}, earlier options", "runs of 12 tasks": len(runs),
            "test top-1": f"{100 * np.mean([r['test_top1'] for run in runs for r in run.values()]):.2f}",
            **against, **{f"new adapter bytes, task {n}": f"{np.mean(fresh[n]):,.0f}" for n in (1, 6, 12)},
            "run_all saves": f"{100 * saved:.1f} %",
        })  # fmt: skip
    return table


BESIDE = ("pear r=12, 0.92", "LoRA qkv r=2", "unpruned r=1", "unpruned r=2", "unpruned r=8", "linear")


def rows_of_bases(every: list[dict[str, Any]]) -> Rows:
    return {(r["name"], r["dataset"], r["seed"]): r for r in every if r["stage"] == "bases"}


def seeds_of_bases(rows: Rows) -> list[int]:
    """The seeds with which every repeated form was run on all sets; the first one in any case."""
    names = {plan.name for form in REPEATED for plan in form.plans("", 0)}
    every = sorted({seed for _, _, seed in rows})
    return [seed for seed in every if seed == 0 or all((name, s, seed) in rows for name in names for s in SETS)]


def table_bases(every: list[dict[str, Any]], final: Rows, seeds: list[int]) -> list[dict[str, Any]]:
    """Tasks on common bases of other sets, beside rows of the final table on the same sets and seeds."""
    rows, sets = rows_of_bases(every), [s for fold in FOLDS for s in fold]
    rows |= {key: row for key, row in final.items() if key[0] in BESIDE}
    rows |= {(r["name"], r["dataset"], r["seed"]): r for r in every if r["stage"] == "few"}
    whole = [n for n in dict.fromkeys(n for n, _, _ in rows) if all((n, s, k) in rows for s in sets for k in seeds)]

    def mean(name: str, what: str) -> float:
        return float(np.mean([rows[name, s, k][what] for s in sets for k in seeds]))

    def against(name: str, other: str) -> str:
        if name == other:
            return ""
        points, low, high = difference(rows, name, other, sets, seeds)
        return f"{points:+.2f} ({low:+.2f} to {high:+.2f})"

    return [
        {
            f"{len(sets)} sets, {len(seeds)} seed(s)": name,
            **{f"{kind} bytes": f"{mean(name, f'{kind}_bytes'):,.0f}" for kind in ("adapter", "head")},
            "whole task": f"{mean(name, 'adapter_bytes') + mean(name, 'head_bytes'):,.0f}",
            "val top-1": f"{100 * mean(name, 'val_top1'):.2f}", "test top-1": f"{100 * mean(name, 'test_top1'):.2f}",
            **{f"− {other}": against(name, other) for other in ("pear r=12, 0.92", "unpruned r=8")},
        }
        for name in sorted(whole, key=lambda name: mean(name, "adapter_bytes"))
    ]  # fmt: skip


def table_score(every: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Own parts on common bases placed by the score, beside its controls, where a set has all three."""
    rows = rows_of_bases(every)
    forms = dict.fromkeys(n.removesuffix(" by importance") for n, _, _ in rows if n.endswith(" by importance"))
    table = []
    for form in forms:
        names = [f"{form} {where}" for where in OWN]
        cases = sorted((s, k) for n, s, k in rows if n == names[0] and all((one, s, k) in rows for one in names))
        seeds = sorted({k for _, k in cases})
        sets = [s for s in SETS if all((s, k) in cases for k in seeds)]
        for name in names if cases and sets else ():
            mean, low, high = difference(rows, names[0], name, sets, seeds)
            table.append({
                "own parts": name,
                **{s: f"{100 * np.mean([rows[name, s, k]['test_top1'] for k in seeds]):.1f}" for s in sets},
                "val top-1": f"{100 * np.mean([rows[name, s, k]['val_top1'] for s in sets for k in seeds]):.2f}",
                "test top-1": f"{100 * np.mean([rows[name, s, k]['test_top1'] for s in sets for k in seeds]):.2f}",
                "by importance − it": "" if name == names[0] else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})",
            })  # fmt: skip
    return table


def exceptions(every: list[dict[str, Any]]) -> str:
    """Which rows were run in float32."""
    rows: dict[tuple[str, int], set[str]] = defaultdict(set)
    for r in every:
        if r["options"]["dtype"] == "float32":
            rows[r["stage"], r["seed"]].add(r["dataset"])
    told = [f"`{stage}` at seed {seed} on {len(sets)} set(s)" for (stage, seed), sets in rows.items()]
    return f" (float32, on a CPU that is slower in bfloat16: {', '.join(told)})" if told else ""


Points = dict[str, tuple[float, dict[str, float]]]
"""By method: accuracy in %, and bytes a task of each kind."""


def points(best: Standings) -> Points:
    """The final table's, without the linear probe."""
    sizes = {name: {kind: best.size(name, kind) for kind in SIZES} for name in best.names}
    return {name: (best.top1(name), sizes[name]) for name in reversed(best.names) if name != "linear"}


def points_of_peers(every: list[dict[str, Any]]) -> Points:
    """Every peer at the best of its learning rates, on val of four sets."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: defaultdict(list) for name in PEERS.values()}
    for r in every:
        before, _, rate = r["name"].partition(", lr ")
        _, _, more = rate.partition(", ")
        named = before + (f", {more}" if more else "")
        if r["stage"] in ("shape", "peers") and r["seed"] == 0 and named in PEERS:
            runs[PEERS[named]][rate].append(r)
    found: Points = {}
    for name, rates in runs.items():
        best = max(rates.values(), key=lambda rows: sum(r["val_top1"] for r in rows))
        sizes = {kind: float(np.mean([r[f"{kind}_bytes"] for r in best])) for kind in SIZES}
        found[name] = 100 * float(np.mean([r["val_top1"] for r in best])), sizes
    return found


def plot(methods: Points, what: str, path: Path) -> None:
    """Accuracy over bytes a task, of adapters and with the head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, head in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for (name, (top1, sizes)), marker in zip(methods.items(), MARKERS, strict=False):
            control = name.startswith("unpruned") or name.endswith(("random importance", "no sharing"))
            colour = CONTROL if control else PEAR if name.startswith("pear") else PEER
            size = sum(sizes.values()) - (0 if head else sizes["head"])
            axes.plot(size / 1024, top1, marker, color=colour, label=None if head else name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"adapter{' and head' if head else ''} bytes a task, KiB (float16)")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(what)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
