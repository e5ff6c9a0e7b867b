"""Writes a task as a folder for the Hugging Face Hub.

README.md             the model card
pear.safetensors      what `pear-store export` writes; `pear-store add hf://OWNER/NAME` takes it back
picture.png           the training curve, or what the caller draws
peft/                 what `pear-store export-peft` writes, if the task can be a LoRA of PEFT's
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pear_store.errors import CheckpointError, PearStoreError, from_os_error
from pear_store.exchange import peft
from pear_store.exchange.card import Publication, make_card
from pear_store.exchange.curve import curve_of, draw_curve
from pear_store.format.checkpoint import HUB_CHECKPOINT, HUB_LORA, Task, read_checkpoint, write_checkpoint
from pear_store.format.manifest import with_plain_names

CARD, PICTURE = "README.md", "picture.png"
_LORA_FILES = tuple(f"{HUB_LORA}/{name}" for name in (peft.CONFIG, peft.WEIGHTS, peft.SIDECAR))
OURS = (*_LORA_FILES, PICTURE, CARD, HUB_CHECKPOINT)
"""All files that are ever written into a folder, in the order in which they are moved there"""


@dataclass
class HubFolder:
    """What was written.

    Args:
        files: the bytes of each file.
        notes: what was left out, and why.
    """

    files: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def export_hub(
    task: Task,
    folder: str | Path,
    publication: Publication | None = None,
    *,
    weights: str | Path | None = None,
    draw: Callable[[Path], None] | None = None,
    force: bool = False,
) -> HubFolder:
    """Writes a folder that can be uploaded to the Hugging Face Hub as it is. A new folder is made whole or not at all.

    Args:
        folder: a new folder, an empty one, or an earlier export of the same task. Only files of :data:`OURS` are
            replaced in it.
        publication: license, backbone and repository. If timm loads the backbone from the Hub, the backbone need not
            be given.
        weights: a local safetensors file of the backbone's weights.
        draw: draws a picture to a path, for a task whose record has no training curve.
        force: write into a folder that holds something else.

    Raises:
        PearStoreError: the folder holds something else, huggingface_hub is not installed, or a file cannot be written.
    """
    folder, publication, result = Path(folder), publication or Publication(), HubFolder()
    try:
        publication.check()
    except ImportError:
        raise PearStoreError("export-hub needs huggingface_hub: pip install 'pear-adapters[hub]'") from None
    _check_folder(folder, task, force)
    described, reason = _describe(task, weights)
    if publication.base_model is None and weights is None and described:
        publication = replace(publication, base_model=described.get("hub"))
    if publication.base_model is None:
        result.notes.append("no base_model: the backbone may not be on the Hub; if it is, name it with --base-model")
    if publication.license is None:
        result.notes.append("no license: name one with --license, such as apache-2.0")
    temporary = folder.parent / f".{uuid4().hex}.tmp"
    try:
        temporary.mkdir()
        size = write_checkpoint(temporary / HUB_CHECKPOINT, with_plain_names(task))
        if not _write_lora(task, temporary / HUB_LORA, described, reason, result):
            shutil.rmtree(temporary / HUB_LORA, ignore_errors=True)
        _write_picture(task, temporary / PICTURE, draw, result)
        picture, lora = (name if (temporary / name).exists() else None for name in (PICTURE, HUB_LORA))
        with open(temporary / CARD, "x", encoding="utf-8", newline="") as file:
            file.write(make_card(task, publication, size, picture, lora))
            file.flush()
            os.fsync(file.fileno())
        result.files = {name: (temporary / name).stat().st_size for name in OURS if (temporary / name).exists()}
        _move(temporary, folder)
    except OSError as error:
        raise from_os_error(error, folder) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def _check_folder(folder: Path, task: Task, force: bool) -> None:
    """Raises a PearStoreError unless the folder may be written into."""
    try:
        if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            return
        if not folder.is_dir():
            raise PearStoreError(f"{folder}: exists and is no folder; name another")
        if (folder / HUB_LORA).is_symlink():
            raise PearStoreError(f"{folder / HUB_LORA}: expected a folder, found a link; remove the link")
    except OSError as error:
        raise from_os_error(error, folder) from None
    if force:
        return
    holds = "is not empty"
    with suppress(PearStoreError):
        name = read_checkpoint(folder / HUB_CHECKPOINT).name
        if name == task.name:
            return
        holds = f"holds task {name!r}"
    ours = f"{CARD}, {HUB_CHECKPOINT}, {PICTURE} and {HUB_LORA}/"
    raise PearStoreError(f"{folder}: {holds}; name another folder, or --force replaces {ours} in it")


def _describe(task: Task, weights: str | Path | None) -> tuple[dict[str, Any] | None, str]:
    """The task's backbone as :func:`peft.describe_backbone` gives it; or None, and why there is none."""
    try:
        described = peft.describe_backbone(task.backbone_model, weights)
    except PearStoreError as error:
        return None, f"the backbone cannot be looked at: {error}"
    if described is None:
        return None, f"nothing installed here knows {task.backbone_model}"
    if described["digest"] != task.backbone_digest:
        return None, f"{task.backbone_model} has other weights here than those that the task was made for"
    return described, ""


def _write_lora(task: Task, folder: Path, described: dict[str, Any] | None, reason: str, result: HubFolder) -> bool:
    if described and described["head"] is None:
        reason = "the backbone has several classifiers"
    elif described:
        try:
            peft.export_peft(task, folder, linears=described["linears"], head=described["head"])
            return True
        except CheckpointError as error:
            reason = error.problem
    result.notes.append(f"no {HUB_LORA}/: {reason}")
    return False


def _write_picture(task: Task, path: Path, draw: Callable[[Path], None] | None, result: HubFolder) -> None:
    try:
        if curve := curve_of(task.record["training"]):
            draw_curve(curve, path)
        elif draw is not None:
            draw(path)
        else:
            result.notes.append(f"no {PICTURE}: the record has no training curve")
    except ImportError:
        result.notes.append(f"no {PICTURE}: that needs matplotlib: pip install 'pear-adapters[hub]'")


def _move(temporary: Path, folder: Path) -> None:
    if not os.path.lexists(folder):
        os.replace(temporary, folder)
        return
    (folder / HUB_LORA).mkdir(exist_ok=True)
    for name in OURS:
        if (temporary / name).exists():
            os.replace(temporary / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # from an earlier export
    with suppress(OSError):
        (folder / HUB_LORA).rmdir()
