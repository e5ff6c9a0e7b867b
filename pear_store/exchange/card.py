"""A task's model card for the Hugging Face Hub: metadata by huggingface_hub, then Markdown.

A record may be a stranger's. Its texts are shortened and escaped, so a page only shows them as text.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pear_store.counted import counted
from pear_store.errors import PearStoreError
from pear_store.format.checkpoint import HUB_CHECKPOINT, Task

LIBRARY = "pear-adapters"
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_SIMPLE = re.compile(r"[A-Za-z0-9 ._:/+,\[\]-]{1,200}")
_ACCURACY = re.compile(r"(train|val|test)_top([1-9])")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,99}")
_JOINERS = "\u200c\u200d"  # zero-width joiners, which some scripts and emoji need
_MOST_TEXT, _MOST_ROWS, _MOST_LABELS, _FOLDED = 200, 100, 10_000, 20


@dataclass(frozen=True)
class Publication:
    """What a record does not say. A field that is None is left out of the card.

    Args:
        license: the Hub's name of it, such as ``apache-2.0``.
        base_model: the backbone's repository on the Hub, OWNER/NAME.
        repository: where the folder will be uploaded, OWNER/NAME.
    """

    license: str | None = None
    base_model: str | None = None
    repository: str | None = None

    def check(self) -> None:
        """Checks that the Hub accepts the fields.

        Raises:
            PearStoreError: it does not.
            ImportError: huggingface_hub is missing or too old.
        """
        from huggingface_hub import parse_hf_uri  # noqa: F401  the newest name that this module needs

        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise PearStoreError(f"license {self.license!r}: expected the Hub's name of a license, such as apache-2.0")
        for what, name in (("base model", self.base_model), ("repository", self.repository)):
            if name is not None and not is_repository(name):
                raise PearStoreError(f"{what} {name!r}: expected OWNER/NAME, as the Hub takes it")


def is_repository(name: str) -> bool:
    from huggingface_hub import parse_hf_uri

    try:
        return bool(parse_hf_uri(f"hf://{name}").id == name)
    except ValueError:
        return False


def make_card(task: Task, publication: Publication, file_bytes: int, picture: str | None, lora: str | None) -> str:
    """The text of README.md.

    Args:
        file_bytes: the checkpoint's size.
        picture: the name of a picture beside README.md, if there is one.
        lora: the name of the folder with the LoRA, if there is one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    results = list(_results(task))
    data = ModelCardData(
        base_model=publication.base_model,
        library_name=LIBRARY,
        license=publication.license,
        pipeline_tag="image-classification" if task.labels else "image-feature-extraction",
        tags=["image-classification", "timm", "pear", "adapter", *(["peft", "lora"] if lora else [])],
        metrics=["accuracy"] if any(result.metric_type == "accuracy" for result in results) else None,
        eval_results=results or None,
        model_name=task.name if results else None,
    )
    text = "\n\n".join(_text(task, publication, file_bytes, picture, lora))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _text(
    task: Task, publication: Publication, file_bytes: int, picture: str | None, lora: str | None
) -> Iterable[str]:
    kind = (
        f"An image classifier of {counted(len(task.labels), 'class', 'classes')}"
        if task.labels
        else "A source of image features"
    )
    yield f"# {shown(task.name)}"
    yield (
        f"{kind}: a small adapter set for one frozen timm backbone, made with Pear. `{HUB_CHECKPOINT}` has "
        f"{file_bytes:,} bytes: adapters at {counted(len(task.positions), 'position')}, classifier, labels, "
        "preprocessing. The backbone is not in it."
    )
    if publication.license is None:
        yield "No license is given here. Ask whoever published this before you use it."
    if picture:
        yield f"![How it was trained, or what its positions share]({picture})"
    yield "## Use"
    yield _use(task, publication)
    if lora:
        yield f"`{lora}/` holds the same task as a LoRA of PEFT's:"
        yield "\n".join(
            [
                "```python",
                f"model = timm.create_model({json.dumps(task.backbone_model)}, pretrained=True, "
                f"num_classes={len(task.labels)})",
                f'model = PeftModel.from_pretrained(model, "{_repository(task, publication)}", subfolder="{lora}")',
                "```",
            ]
        )
    if task.record["metrics"]:
        yield "## Metrics"
        yield "As the training run recorded them. Nobody else has checked them."
        yield _table(("metric", "value"), task.record["metrics"])
    if task.threshold is not None and task.labels:
        yield "## Unknown"
        yield f"An answer whose probability is below {task.threshold:.4g} counts as unknown."
    yield "## Backbone"
    on_hub = f" (on the Hub: {code(base)})" if (base := publication.base_model) else ""
    yield f"{code(task.backbone_model)}{on_hub}. Pear runs the task on no other weights than those of this digest:"
    yield code(task.backbone_digest)
    yield "## Preprocessing"
    yield _table(("", ""), task.preprocess)
    if task.labels:
        yield "## Labels"
        yield _labels(task.labels)
    options = {key: value for key, value in task.record["training"].items() if _is_option(key, value)}
    if options:
        yield "## Training"
        yield _folded(f"{len(options):,} options", _table(("option", "value"), options))


def _use(task: Task, publication: Publication) -> str:
    result = "labels" if task.labels else "logits"
    return "\n".join(
        [
            "```sh",
            f"pip install '{LIBRARY}[hub]'",
            "pear-store init --store pear.store",
            f"pear-store add hf://{_repository(task, publication)} --store pear.store",
            "```",
            "",
            "```python",
            "from router import Router",
            "",
            f'Router({json.dumps(task.backbone_model)}, "pear.store").run(["a.jpg"], task="{task.name}").{result}',
            "```",
        ]
    )


def _repository(task: Task, publication: Publication) -> str:
    """Where the folder will be uploaded, or a guess. The Hub does not accept every task's name."""
    guess = f"OWNER/{task.name}"
    return publication.repository or (guess if is_repository(guess) else "OWNER/NAME")


def _results(task: Task) -> Iterable[Any]:
    from huggingface_hub import EvalResult

    splits = {"train": "train", "val": "validation", "test": "test"}
    for key, value in list(task.record["metrics"].items())[:_MOST_ROWS]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            continue
        accuracy = _ACCURACY.fullmatch(key)
        yield EvalResult(
            task_type="image-classification",
            dataset_type="custom",
            dataset_name=task.name,  # not the data folder's name, which is private
            dataset_split=splits[accuracy[1]] if accuracy else None,
            metric_type="accuracy" if accuracy else _plain(key) or "unnamed",
            metric_name=f"top-{accuracy[2]} on {accuracy[1]}" if accuracy else None,
            metric_value=value,
        )


def _is_option(key: str, value: object) -> bool:
    """Whether a field is an option to publish. Fields that name the trainer's folders and machines are not."""
    return isinstance(value, str | int | float) and not key.startswith("data") and "fingerprint" not in key


def _labels(labels: Iterable[str]) -> str:
    names = list(labels)
    rows = [f"{number}. {shown(name)}" for number, name in enumerate(names[:_MOST_LABELS])]
    if len(names) > _MOST_LABELS:
        rows.append(f"\nAnd {len(names) - _MOST_LABELS:,} more, which the checkpoint has.")
    return "\n".join(rows) if len(names) <= _FOLDED else _folded(f"{len(names):,} labels", "\n".join(rows))


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _table(heads: tuple[str, str], values: Mapping[str, Any]) -> str:
    rows = [f"| {shown(key)} | {_value(value)} |" for key, value in list(values.items())[:_MOST_ROWS]]
    if len(values) > _MOST_ROWS:
        rows.append(f"| … | {len(values) - _MOST_ROWS:,} more in the checkpoint |")
    return "\n".join([f"| {heads[0]} | {heads[1]} |", "|---|---|", *rows])


def _value(value: object) -> str:
    return code(f"{value:.4g}" if isinstance(value, float) else str(value))


def code(text: str) -> str:
    """Shows plain names and numbers as code, and anything else as text."""
    return f"`{text}`" if _SIMPLE.fullmatch(text) else shown(text)


def shown(text: str) -> str:
    """Markdown that shows a text as it is: on one line, shortened, nothing in it interpreted."""
    return _PUNCTUATION.sub(r"\\\1", _plain(text)) or "*(empty)*"


def _plain(text: str) -> str:
    shortened = text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1]}…"
    spaced = "".join(" " if c.isspace() else c for c in shortened).strip()
    return "".join(c if c.isprintable() or c in _JOINERS else f"(U+{ord(c):04X})" for c in spaced)
