#!/usr/bin/env python3
"""What pear_tiny is worth: linear probes over 12 data sets beside its untrained self and DeiT-tiny, and its speed.

Probe: logistic regression (scikit-learn, L-BFGS) on the frozen, standardised features of the train split; C chosen on
val from 6 values; test looked at once. No set of these was used in pretraining.

    python -m benchmarks.study.pear_tiny --data ../shared/data \
        --deit ../shared/weights/deit_tiny_patch16_224.safetensors --out benchmarks/results/pear_tiny.json
"""

import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import click
import timm
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from pear_train.data import Dataset, Pixels, open_dataset, preprocess_record
from router import AdaptedBackbone, Backbone, Preprocess, choose_positions, load_backbone
from router.precision import fast_precision

CHOICES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


@torch.inference_mode()
def features(adapted: AdaptedBackbone, preprocess: Preprocess, dataset: Dataset) -> dict[str, Any]:
    out = {}
    for name, split in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test)):
        assert split is not None, f"{dataset}: no split {name}"
        pixels = Pixels(split, preprocess)
        rows = torch.arange(len(pixels)).split(100)
        x = torch.cat([adapted.features(pixels.images(part), {}) for part in rows])
        out[name] = (x, pixels.targets.numpy())
    mean, std = out["train"][0].mean(0), out["train"][0].std(0).clamp_min(1e-6)
    return {name: (((x - mean) / std).numpy(), y) for name, (x, y) in out.items()}


def probe(data: dict[str, Any]) -> float:
    """Test top-1 of the C that is best on val (the smaller of equals)."""
    best = -1.0
    chosen: Any = None
    for c in CHOICES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=c, max_iter=300).fit(*data["train"])
        score = model.score(*data["val"])
        if score > best:
            best, chosen = score, model
    return float(chosen.score(*data["test"]))


def rate(step: Any, images: int, seconds: float = 5.0) -> float:
    """Images a second: the median of repeated calls."""
    step()
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return images / sorted(times)[len(times) // 2]


def speed(backbone: Backbone) -> dict[str, Any]:
    """Images a second at batch 64 on 2 threads, in the precision that pear-train chooses: inference, training the
    adapters of all block positions (as pear-train does), and training every weight."""
    torch.set_num_threads(2)
    precision = fast_precision(torch.device("cpu"))
    autocast = None if precision == torch.float32 else precision
    adapted = AdaptedBackbone(backbone, torch.device("cpu"), torch.float32, for_training=True)
    positions = choose_positions(backbone.module, "blocks")
    adapted.attach(positions)
    from pear_train.adapters import AdapterSet

    adapters = AdapterSet(adapted.widths, 8, "identity", 1.0, torch.Generator().manual_seed(0))
    images = torch.randn(64, 3, *backbone.input_size)

    @torch.inference_mode()
    def infer() -> None:
        adapted.features(images, {}, autocast)

    def train_adapters() -> None:
        adapters.zero_grad()
        adapted.features(images, adapters.position_weights(), autocast).square().mean().backward()

    whole: Any = timm.create_model("pear_tiny", pretrained=True)
    for block in whole.blocks:
        block.attn.fused_attn = False

    def train_whole() -> None:
        whole.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            out = whole(images)
        out.float().square().mean().backward()

    return {
        "precision": str(precision).removeprefix("torch."),
        "inference_images_per_s": round(rate(infer, 64), 1),
        "adapter_training_images_per_s": round(rate(train_adapters, 64), 1),
        "full_training_images_per_s": round(rate(train_whole, 64), 1),
    }


@click.command(help=__doc__)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--deit", type=click.Path(exists=True), required=True, help="DeiT-tiny weights.")
@click.option("--weights", type=click.Path(exists=True), help="Other pear_tiny weights than the embedded ones.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, deit: str, weights: str | None, out: Path) -> None:
    torch.manual_seed(0)
    trained = load_backbone("pear_tiny", weights)
    models = {
        "untrained pear_tiny": (load_backbone(timm.create_model("pear_tiny")), None),
        "pear_tiny": (trained, None),
        "DeiT-tiny at 96": (load_backbone("deit_tiny_patch16_224", deit), 96),
    }
    table: dict[str, dict[str, float]] = {}
    adapted = {n: AdaptedBackbone(b, torch.device("cpu"), torch.float32) for n, (b, _) in models.items()}
    for file in sorted(data.glob("*.npz")):
        dataset = open_dataset(str(file))
        table[file.stem] = {}
        for name, (backbone, size) in models.items():
            preprocess = Preprocess(preprocess_record(backbone, size))
            table[file.stem][name] = round(100 * probe(features(adapted[name], preprocess, dataset)), 2)
        click.echo(f"{file.stem:20} " + "  ".join(f"{n} {v:.1f}" for n, v in table[file.stem].items()))
    means = {name: round(sum(row[name] for row in table.values()) / len(table), 2) for name in models}
    low, mid, high = means.values()
    result = {
        "command": "python -m benchmarks.study.pear_tiny",
        "machine": f"{platform.machine()}, 2 threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "digest": trained.digest,
        "test_top1": table,
        "mean": means,
        "share_of_gap_closed": round((mid - low) / (high - low), 3),
        "speed": speed(trained),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps({key: result[key] for key in ("mean", "share_of_gap_closed", "speed")}, indent=1))


if __name__ == "__main__":
    main()
