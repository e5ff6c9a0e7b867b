"""Commands that read and write the formats of other programs."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from pear_store.cli.group import complete_task, main, open_store, store_directory, store_option
from pear_store.cli.tasks import added_line
from pear_store.errors import PearStoreError
from pear_store.exchange.models import Kind, exporter
from pear_store.format.container import read_json
from pear_store.store import Store
from pear_store.terminal import NamedPath, echo, echo_json, json_option

F = TypeVar("F", bound=Callable[..., Any])


@main.command("import-peft")
@click.argument("folder", type=NamedPath(path_type=Path))
@click.option("--name", help="The task's name [default: pear.json's].")
@click.option("--backbone", help="timm name of the backbone [default: pear.json's].")
@click.option("--digest", help="The backbone's digest, if timm or the weights are not installed here.")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--labels", type=click.Path(path_type=Path), help="UTF-8 file of class names, one a line.")
@click.option("--preprocess", metavar="timm|FILE", help="The model's own preprocessing (timm), or a JSON file of it.")
@click.option("--features-only", is_flag=True, help="Take a LoRA without a classifier: its task gives features.")
@store_option
@json_option
def import_peft(
    folder: Path, name: str | None, backbone: str | None, digest: str | None, weights: str | None,
    labels: Path | None, preprocess: str | None, features_only: bool, as_json: bool,
) -> None:  # fmt: skip
    """Add a LoRA that Hugging Face PEFT saved for a timm model.

    Reads FOLDER's adapter_config.json and adapter_model.safetensors. Name, backbone, labels and preprocessing come from
    the options, else from a pear.json beside them, as export-peft writes. If one of these is missing, the command says
    so and adds nothing. Preprocessing is never guessed: with the wrong one, a task can lose most of its accuracy.

    The JSON of --preprocess, here for a LoRA that was trained on whole pictures at 96 pixels:

    \b
    {"input_size": [3, 96, 96],            3, height, width in pixels
     "mean": [0.5, 0.5, 0.5],              subtracted from red, green, blue in 0 to 1
     "std": [0.5, 0.5, 0.5],               then divided by
     "interpolation": "bicubic",           nearest, bilinear, bicubic, box, hamming or lanczos
     "crop_pct": 1.0,                      how much of the resized picture is kept
     "crop_mode": "squash"}                center, squash or border, as in timm
    """
    from pear_store.exchange import peft

    described: dict[str, Any] | None = None
    if backbone is not None:
        described = {"model": backbone, "digest": digest} if digest else peft.describe_backbone(backbone, weights)
        if described is None:
            raise PearStoreError(f"backbone {backbone!r}: nothing installed here can hash it; give --digest")
    if preprocess == "timm" and not (described and "preprocess" in described):
        raise click.UsageError("--preprocess timm needs the model in timm: give --backbone MODEL, without --digest")
    task = peft.import_peft(
        folder, name=name, backbone=described, labels=peft.read_labels(labels) if labels else None,
        preprocess=_preprocess(preprocess, described), features_only=features_only,
    )  # fmt: skip
    with Store(store_directory()) as store:
        result = store.add(task)
    if as_json:
        echo_json([{"file": str(folder), **asdict(result)}])
    else:
        echo(added_line(result))


def _preprocess(choice: str | None, described: dict[str, Any] | None) -> Any:
    if choice == "timm" and described:
        return described["preprocess"]
    return None if choice is None else read_json(choice)


@main.command("export-peft")
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("folder", type=NamedPath(path_type=Path))
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@store_option
@json_option
def export_peft(reference: str, folder: Path, weights: str | None, as_json: bool) -> None:
    """Write a task as a folder that PeftModel.from_pretrained loads onto the timm model.

    PEFT's LoRA is at Linear modules and has no activation. So this command takes tasks that import-peft added. It also
    takes tasks trained with 'pear-train --positions qkv' or '--positions linear' and the activation identity (the
    default). It refuses tasks trained at pear-train's default positions: whole mlp blocks are no Linear modules.
    """
    from pear_store.exchange import peft

    with open_store() as store:
        version = store.resolve(reference)
        exact = f"{version.task}@{version.version}"
        task = store.get(exact, copy=False)
        described = peft.describe_backbone(task.backbone_model, weights)
        if described is None:
            echo(f"Warning: {task.backbone_model} is not known here: positions were not checked", err=True)
        head = described["head"] if described else "head"
        if head is None:
            raise PearStoreError(f"{task.backbone_model} has several classifiers: PEFT cannot hold the task's one head")
        peft.export_peft(task, folder, linears=described["linears"] if described else None, head=head)
    if as_json:
        files = [{"file": path.name, "bytes": path.stat().st_size} for path in sorted(folder.iterdir())]
        echo_json({"task": version.task, "version": version.version, "folder": str(folder), "files": files})
        return
    echo(f"wrote {exact} to {folder}")


@main.command("export-hub")
@click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task)
@click.argument("folder", metavar="DIR", type=NamedPath(path_type=Path))
@click.option("--license", metavar="ID", help="The Hub's name of the license, as apache-2.0 [default: none is given].")
@click.option("--repo", metavar="OWNER/NAME", help="Where the folder will be uploaded; the card names it.")
@click.option("--base-model", metavar="ID", help="The backbone on the Hub [default: where timm loads it from].")
@click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights.")
@click.option("--force", is_flag=True, help="Write into a folder that holds something else.")
@store_option
@json_option
def export_hub(
    reference: str, folder: Path, license: str | None, repo: str | None, base_model: str | None, weights: str | None,
    force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a task as a folder for the Hugging Face Hub, to be uploaded as it is.

    DIR gets pear.safetensors (what 'export' writes), the model card README.md and picture.png. If the task can be a
    LoRA of PEFT's, DIR gets peft/, too. The command says what it leaves out. 'pear-store add hf://OWNER/NAME' adds the
    task to a store again.

    An earlier export of the same task is replaced. Other files in DIR, such as .git, stay. The checkpoint holds the
    whole training record, which names the data and the machine.
    """
    from pear_store.exchange import hub
    from pear_store.exchange.card import Publication
    from pear_store.plot import plot

    with open_store() as store:
        version = store.resolve(reference)
        exact = f"{version.task}@{version.version}"
        result = hub.export_hub(
            store.get(exact, copy=False), folder, Publication(license, base_model, repo), weights=weights,
            draw=lambda path: plot(store, path, [exact]), force=force,
        )  # fmt: skip
    if as_json:
        files = [{"file": name, "bytes": size} for name, size in result.files.items()]
        echo_json({"task": version.task, "version": version.version, "folder": str(folder), "files": files,
                   "notes": result.notes})  # fmt: skip
        return
    echo(f"wrote {exact} to {folder}: " + ", ".join(f"{name} ({size:,} bytes)" for name, size in result.files.items()))
    for note in result.notes:
        echo(f"Note: {note}", err=True)


def model_options(command: F) -> F:
    """Adds the arguments and options of the commands that export whole models."""
    options = [
        click.argument("reference", metavar="TASK[@VERSION]", shell_complete=complete_task),
        click.argument("file", type=NamedPath(dir_okay=False, path_type=Path)),
        click.option("--weights", type=click.Path(), help="Local safetensors file of the backbone's weights."),
        click.option("--force", is_flag=True, help="Replace files that are there."),
        store_option,
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command("export-timm")
@model_options
def export_timm(reference: str, file: Path, weights: str | None, force: bool, as_json: bool) -> None:
    """Write a task as a whole timm model, which needs no Pear: a safetensors state dict.

    Adapters are merged into the backbone's weights, and the head takes the classifier's place. FILE.json says how timm
    makes the model and its transform, and what the classes are. First the model's logits are compared with the
    router's.

    Only adapters at Linears, without an activation, can be merged: those of 'pear-train --positions linear' or qkv.
    Other tasks are refused; export-onnx takes them.
    """
    _export_model("timm", reference, file, weights, force, as_json)


@main.command("export-onnx")
@model_options
def export_onnx(reference: str, file: Path, weights: str | None, force: bool, as_json: bool) -> None:
    """Write a task as an ONNX file, for phones, browsers and other runtimes.

    Takes any task. Adapters that cannot be merged into weights become nodes of the graph. Input "images" is float32
    [batch, 3, height, width], normalised; output "logits" is [batch, classes]. The batch may have any size. Labels and
    preprocessing are in the file's metadata and in FILE.json. First the logits in onnxruntime are compared with the
    router's.

    Needs onnx, onnxscript and onnxruntime: pip install 'pear-adapters[onnx]'.
    """
    _export_model("onnx", reference, file, weights, force, as_json)


def _export_model(kind: Kind, reference: str, file: Path, weights: str | None, force: bool, as_json: bool) -> None:
    with open_store() as store:
        version = store.resolve(reference)
        exact = f"{version.task}@{version.version}"
        task = store.get(exact, copy=False)
        result = exporter(kind)(task, file, name=exact, weights=weights, force=force)
    if as_json:
        files = [{"file": name, "bytes": size} for name, size in result.pop("files").items()]
        echo_json({"task": version.task, "version": version.version, "files": files, **result})
        return
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in result["files"].items())
    opset = f"; opset {result['opset']}" if "opset" in result else ""
    echo(f"wrote {exact} to {sizes}{opset}; logits differ from the router's by at most {result['max_difference']:.1e}")
