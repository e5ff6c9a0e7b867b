#!/usr/bin/env python3
"""Shows all of Pear in a few minutes: five tasks on real images, one store, one backbone, one mixed batch.

The images come with scikit-learn and scikit-image, the backbone with Pear. Nothing is downloaded.

    python tools/demo.py --out demo-out
"""

import contextlib
import io
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate

import pear_store.cli
import pear_train.cli
from router import Router, load_backbone, open_image

Picture = NDArray[np.uint8]
Labelled = dict[str, list[tuple[Picture, str]]]
"""Split -> pictures with their class names."""
METHODS = ("linear", "adapters", "pear")
SIDE = 48
MARK = ".pear-demo"
"""Name of a file that marks a folder of the demo."""


# ---- real images from installed packages ------------------------------------------------------


def digits() -> Labelled:
    """Handwritten digits (scikit-learn, from UCI), 8 x 8."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    pictures = [((data.images[i] * 255 / 16).astype(np.uint8), str(data.target[i])) for i in order]
    return {"train": pictures[:400], "val": pictures[400:600], "test": pictures[600:1200]}


def faces() -> Labelled:
    """Faces and other crops of photographs (scikit-image, from Labeled Faces in the Wild), 25 x 25."""
    from skimage.data import lfw_subset

    images = (lfw_subset() * 255).astype(np.uint8)
    pictures = [(image, "face" if i < 100 else "other") for i, image in enumerate(images)]
    order = np.random.default_rng(0).permutation(len(pictures))
    pictures = [pictures[i] for i in order]
    return {"train": pictures[:80], "val": pictures[80:120], "test": pictures[120:]}


def _cells(image: Picture, side: int, rng: np.random.Generator) -> dict[str, list[Picture]]:
    """Cuts an image into cells of `side` pixels and divides them among the splits. No two splits share a pixel."""
    height, width = image.shape[:2]
    cells = [
        image[y : y + side, x : x + side]
        for y in range(0, height - side + 1, side)
        for x in range(0, width - side + 1, side)
    ]
    cells = [cells[i] for i in rng.permutation(len(cells))]
    a, b = int(0.45 * len(cells)), int(0.6 * len(cells))
    return {"train": cells[:a], "val": cells[a:b], "test": cells[b:]}


def _by_source(names: tuple[str, ...], side: int, most: int, grey: bool) -> Labelled:
    """Cells of images. The class of a cell is the image that it comes from."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    out: Labelled = {"train": [], "val": [], "test": []}
    rng = np.random.default_rng(0)
    for name in names:
        image = np.asarray(open_image(folder / name).convert("L" if grey else "RGB"))
        for split, cells in _cells(image, side, rng).items():
            limit = {"train": most, "val": most // 2, "test": most}[split]
            out[split] += [(cell, Path(name).stem) for cell in cells[:limit]]
    return out


def textures() -> Labelled:
    """Small grey cells of brick, grass, gravel, tissue and moon (scikit-image)."""
    return _by_source(("brick.png", "grass.png", "gravel.png", "ihc.png", "moon.png"), 24, 80, grey=True)


PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
)


def photos() -> Labelled:
    """Which photograph (scikit-image) is this small piece of?"""
    return _by_source(PHOTOGRAPHS, 32, 64, grey=False)


def upright() -> Labelled:
    """Which way up is this face? Other people in train, val and test."""
    turns = ("upright", "left", "upside down", "right")
    people = {split: [image for image, label in pictures if label == "face"] for split, pictures in faces().items()}
    return {
        split: [(np.rot90(image, k).copy(), turns[k]) for image in images for k in range(4)]
        for split, images in people.items()
    }


TASKS: dict[str, Callable[[], Labelled]] = {
    "digits": digits,
    "faces": faces,
    "textures": textures,
    "photos": photos,
    "upright": upright,
}


def write_folder(root: Path, labelled: Labelled) -> None:
    """Writes an image folder: split/class/number.png."""
    for split, pictures in labelled.items():
        for i, (picture, label) in enumerate(pictures):
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{i:04}.png")


# ---- the demo ---------------------------------------------------------------------------------


def empty_folder(out: Path) -> None:
    """Makes the demo's folder, or removes the files of an earlier demo.

    Raises:
        ClickException: the folder holds something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / MARK).is_file():
        raise click.ClickException(f"{out}: holds files that the demo did not make: choose another --out")
    own = {MARK, "data", "pear.store", "table.txt", "adapters.png"}
    own |= {f"{task}-{method}.safetensors" for task in TASKS for method in METHODS}
    strange = sorted(path.name for path in out.iterdir() if path.name not in own)
    if strange:
        raise click.ClickException(
            f"{out}: holds {strange[0]!r}, which is not the demo's: move it away, or choose another --out"
        )
    (out / MARK).touch()
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()


def heading(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def call(command: click.Command, name: str, *args: object, quiet: bool = False) -> str:
    """Runs one of Pear's commands in this process, as a shell would, and returns its output."""
    words = [str(arg) for arg in args]
    if not quiet:
        click.secho(f"$ {shlex.join([name, *words])}", fg="cyan")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            command.main(words, standalone_mode=False)
        except click.exceptions.Exit as stop:
            if stop.exit_code:
                raise
    return printed.getvalue()


def store(*args: object) -> str:
    text = call(pear_store.cli.main, "pear-store", *args)
    click.echo(text, nl=False)
    return text


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    click.echo(f"({what}: {time.perf_counter() - began:.0f} s)")


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-out"), show_default=True)
@click.option("--epochs", default=14, show_default=True)
def main(out: Path, epochs: int) -> None:
    empty_folder(out)
    tests: dict[str, list[tuple[Picture, str]]] = {}
    heading("1. Real images, from installed packages, as image folders")
    for task, make in TASKS.items():
        labelled = make()
        write_folder(out / "data" / task, labelled)
        tests[task] = labelled["test"]
        classes = len({label for _, label in labelled["train"]})
        counts = ", ".join(f"{len(pictures)} {split}" for split, pictures in labelled.items())
        click.echo(f"{task:9} {classes:2} classes; {counts}.  {make.__doc__}")

    heading("2. Train: head only, all adapters, pruned and shared")
    reports: dict[str, dict[str, Any]] = {}
    with timed("training"):
        for task in TASKS:
            reports[task] = {}
            for method in METHODS:
                file = out / f"{task}-{method}.safetensors"
                printed = call(
                    pear_train.cli.main, "pear-train", task, "--data", out / "data" / task, "--out", file,
                    "--method", method, "--epochs", epochs, "--json",
                )  # fmt: skip
                reports[task][method] = json.loads(printed)

    heading("3. Store: each distinct tensor once")
    where = ("--store", out / "pear.store")
    store(*where, "init")
    store(*where, "add", *(out / f"{task}-pear.safetensors" for task in TASKS))
    click.echo("The same digits for another customer: a name, and no new bytes.")
    store(*where, "add", out / "digits-pear.safetensors", "--name", "digits-customer-b")
    store(*where, "ls")
    stats = json.loads(call(pear_store.cli.main, "pear-store", *where, "stats", "--json"))
    copies = len(TASKS) * load_backbone("pear_tiny").size_bytes
    click.echo(
        f"{stats['tasks']} tasks in {stats['unique_bytes']:,} tensor bytes "
        f"({stats['logical_bytes']:,} before sharing). {len(TASKS)} fine-tuned copies of the backbone would take "
        f"{copies:,} bytes, {copies / stats['unique_bytes']:.0f} times as many."
    )
    store(*where, "plot", out / "adapters.png")

    heading("4. Route: one backbone, five tasks, one batch")
    router = Router("pear_tiny", out / "pear.store")
    rng = np.random.default_rng(0)
    mixed = [(task, *tests[task][i]) for task in TASKS for i in rng.permutation(len(tests[task]))[:60]]
    mixed = [mixed[i] for i in rng.permutation(len(mixed))]
    images, names = [picture for _, picture, _ in mixed], [task for task, _, _ in mixed]
    predictions = router.run(images, names)
    shown = [
        {"image": i, "task": task, "predicted": label, "probability": f"{float(p.max()):.2f}", "truth": truth}
        for i, ((task, _, truth), label, p) in enumerate(zip(mixed, predictions.labels, predictions.probs, strict=True))
    ]
    click.echo(tabulate(shown[:8], headers="keys", disable_numparse=True))
    right = sum(row["predicted"] == row["truth"] for row in shown)
    click.echo(f"… {len(mixed)} images of {len(set(names))} tasks in one batch: {right} right.")
    before = router.run(images[:20], ["digits"] * 20).logits

    heading("5. Remove a task, collect what only it needed")
    store(*where, "rm", "upright", "--yes")
    store(*where, "gc", "--repack-all", "--yes")
    after = Router("pear_tiny", out / "pear.store").run(images[:20], ["digits"] * 20).logits
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    click.echo(f"The others' logits are bit-identical: {torch.equal(before, after)}.")

    heading("6. What it came to")
    table = [
        {"task": task, **{
            title: f"{100 * reports[task][method]['test_top1']:.1f} %  {reports[task][method]['adapter_bytes']:>7,} B"
            for method, title in zip(METHODS, ("linear probe", "unpruned adapters", "Pear"), strict=True)
        }} for task in TASKS
    ]  # fmt: skip
    mean = {"task": "mean"}
    for method, title in zip(METHODS, ("linear probe", "unpruned adapters", "Pear"), strict=True):
        top1 = sum(reports[task][method]["test_top1"] for task in TASKS) / len(TASKS)
        size = sum(reports[task][method]["adapter_bytes"] for task in TASKS) / len(TASKS)
        mean[title] = f"{100 * top1:.1f} %  {size:>7,.0f} B"
    text = tabulate([*table, mean], headers="keys", disable_numparse=True, stralign="right")
    click.echo(text)
    click.echo("Test top-1, and adapter bytes in float16; a head comes on top, the same for all three.")
    (out / "table.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
