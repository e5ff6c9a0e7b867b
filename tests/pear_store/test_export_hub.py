"""Tasks as folders for the Hugging Face Hub."""

import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt

from pear_store import PearStoreError, Store, Task, make_task
from pear_store.exchange import hub as exporting
from pear_store.exchange import peft
from pear_store.exchange.card import Publication, make_card, shown
from pear_store.exchange.hub import export_hub
from tests.helpers.fake_hub import pointed_at, running_hub
from tests.helpers.makers import floats, record, small_task, tensors
from tests.pear_store.test_cli import run
from tests.pear_store.test_store import contents

pytest.importorskip("peft", reason="needs peft: pip install 'pear-adapters[dev]'")
from peft import PeftModel

pytestmark = pytest.mark.slow

PNG = b"\x89PNG"
EVIL = [
    "--- \\ ---", "a | b", "<script>alert(1)</script>", "[x](javascript:1)", "![x](http://a/b.png)", "`code`",
    "**bold**", "www.example.com", "http://example.com", "me@example.com", "&lt;", "# head", "1. one", "- item", "yes",
    "null", ": {", "$$x$$", "a\u2028b", "\u202egnp.exe", "</details>", "\\", "", "  ", "é ß 木", "👩\u200d🔬",
    "x" * 5000,
]  # fmt: skip


def task_with(labels: list[str] | None = None, **changes: Any) -> Task:
    labels = ["banded", "blotchy"] if labels is None else labels
    return make_task(record(labels=labels, **changes), tensors(classes=len(labels)))


def card_of(task: Task, **said: Any) -> Any:
    return ModelCard(make_card(task, Publication(**said), 1000, "picture.png", None))


def test_a_card_says_which_answers_count_as_unknown() -> None:
    said = "An answer whose probability is below 0.875 counts as unknown."
    assert said in card_of(task_with(threshold=0.875)).text
    assert "unknown" not in card_of(task_with()).text


def test_a_folder_holds_what_export_writes_and_a_card_the_hub_can_read(store: Store, tmp_path: Path) -> None:
    store.add(small_task("dtd"))
    done = run("--store", store.path, "export-hub", "dtd", tmp_path / "out", "--license", "mit", "--repo", "acme/dtd",
               "--base-model", "timm/x", "--json")  # fmt: skip
    assert done.exit_code == 0
    told = json.loads(done.output)
    assert (told["task"], told["version"]) == ("dtd", 1)
    written = {str(p.relative_to(tmp_path / "out")): p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert {row["file"]: row["bytes"] for row in told["files"]} == written
    assert written.keys() == {"README.md", "pear.safetensors", "picture.png"}
    store.export("dtd", tmp_path / "dtd.safetensors")
    assert (tmp_path / "out/pear.safetensors").read_bytes() == (tmp_path / "dtd.safetensors").read_bytes()
    assert (tmp_path / "out/picture.png").read_bytes().startswith(PNG)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.to_dict() == {
        "base_model": "timm/x", "license": "mit", "library_name": "pear-adapters", "metrics": ["accuracy"],
        "pipeline_tag": "image-classification", "tags": ["image-classification", "timm", "pear", "adapter"],
        "model-index": [{"name": "dtd", "results": [{
            "task": {"type": "image-classification"},
            "dataset": {"name": "dtd", "type": "custom", "split": "validation"},
            "metrics": [{"type": "accuracy", "value": 0.5, "name": "top-1 on val"}],
        }]}],
    }  # fmt: skip
    for part in ("pear-store add hf://acme/dtd", "0. banded", "`sha256:0000", "| input\\_size | `[3, 48, 48]` |",
                 "| ratio | `0.5` |", "![How it was"):  # fmt: skip
        assert part in card.text
    (note,) = told["notes"]
    assert note == "no peft/: pear_tiny has other weights here than those that the task was made for"


def test_what_the_user_does_not_say_is_absent_and_said(store: Store, tmp_path: Path) -> None:
    store.add(small_task("dtd"))
    done = run("--store", store.path, "export-hub", "dtd", tmp_path / "out")
    assert "Note: no license: name one with --license" in done.stderr
    assert "Note: no base_model: the backbone may not be on the Hub; if it is, name it with --base-model" in done.stderr
    card = ModelCard.load(tmp_path / "out/README.md")
    assert not {"license", "base_model"} & card.data.to_dict().keys()
    assert "No license is given here." in card.text


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"license": "My Own"}, "license 'My Own': expected the Hub's name of a license"),
        ({"base_model": "a\nb"}, "base model .*: expected OWNER/NAME"),
        ({"repository": "dtd"}, "repository 'dtd': expected OWNER/NAME"),
    ],
)
def test_what_the_hub_would_not_take_is_refused(tmp_path: Path, said: dict[str, str], message: str) -> None:
    with pytest.raises(PearStoreError, match=message):
        export_hub(small_task(), tmp_path / "out", Publication(**said))
    assert not list(tmp_path.iterdir())


# ---- text of a stranger's -------------------------------------------------------------------------------------------


def test_whatever_a_label_says_is_shown_as_that_text() -> None:
    card = card_of(task_with(EVIL))
    html = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(card.text)
    assert "<script" not in html and "javascript:" not in re.sub(r">[^<]*<", "><", html)
    listed = re.search(r"<ol start=\"0\">(.*?)</ol>", html, re.DOTALL)
    assert listed
    items = [unescape(item) for item in re.findall(r"<li>(.*?)</li>", listed[1], re.DOTALL)]
    assert items[:20] == [*EVIL[:17], "$$x$$", "a b", "(U+202E)gnp.exe"]
    assert items[20:26] == ["</details>", "\\", "<em>(empty)</em>", "<em>(empty)</em>", "é ß 木", "👩\u200d🔬"]
    assert items[26] == "x" * 199 + "…"
    assert html.count("<details>") == html.count("</details>") == 2  # labels, options


def test_addresses_in_labels_are_no_links() -> None:
    linked = MarkdownIt("gfm-like").disable("linkify").render(" ".join(map(shown, EVIL)))
    assert "<a " not in linked and "<img" not in linked
    for text in ("http://example.com", "www.example.com", "me@example.com"):
        assert not re.search(r"https?://|www\.|\w@", shown(text)), "GitHub's autolinks look at the text as it stands"


def test_names_and_numbers_of_a_record_stay_in_their_fields() -> None:
    metrics: dict[str, Any] = {name: 0.5 for name in EVIL if len(name) < 900}
    metrics |= {"test_top1": 0.75, "flag": True, "text": "1\n---\nlicense: mit", "huge": 10**400, "list": [1]}
    card = card_of(
        task_with(metrics=metrics, backbone={"model": '"); import os; ("`|', "digest": "sha256:" + "0" * 64})
    )
    found = card.data.to_dict()
    assert "license" not in found
    values = {m["type"]: m["value"] for result in found["model-index"][0]["results"] for m in result["metrics"]}
    assert values["accuracy"] == 0.75
    assert values["null"] == values["--- \\ ---"] == 0.5
    assert not {"flag", "text", "huge", "list"} & values.keys()
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert code
    compile(code[1], "card", "exec")
    assert code[1].count("import") == 2  # ours, and the one that stays in its string


def test_a_thousand_labels_are_folded_and_a_million_bytes_of_options_are_not_shown() -> None:
    training = {"method": "pear", "long": "y" * 1_000_000, **{f"option{i}": i for i in range(5000)},
                "data_name": "secret-customer", "machines": [{"host": "secret-host"}]}  # fmt: skip
    labels = [f"class {i}" for i in range(1000)]
    card = card_of(task_with(labels, training=training))
    assert "<details><summary>1,000 labels</summary>\n\n0. class 0\n" in card.text
    assert "999. class 999\n\n</details>" in card.text
    assert len(card.text) < 50_000
    assert "secret" not in str(card)
    assert "<summary>" not in card_of(task_with(["a", "b"], training={})).text


def test_a_task_without_metrics_labels_or_options_and_with_a_name_that_the_hub_does_not_take(tmp_path: Path) -> None:
    bare = make_task(
        record("a--b..git", metrics={}, training={}, labels=[], head=None),
        {name: tensor for name, tensor in tensors().items() if not name.startswith("head")},
    )
    result = export_hub(bare, tmp_path / "out")
    assert result.files.keys() == {"README.md", "pear.safetensors"}
    assert "no picture.png: the record has no training curve" in result.notes
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "model-index" not in card.data.to_dict()
    assert "hf://OWNER/NAME " in card.text
    assert "## Labels" not in card.text and "## Metrics" not in card.text


@pytest.mark.parametrize("history", [5, [], [1, 2], [{"val_top1": "x"}] * 3, [{"val_top1": 7}] * 3, [{}] * 3])
def test_a_history_that_is_none_gives_no_curve(tmp_path: Path, history: Any) -> None:
    drawn: list[Path] = []
    export_hub(task_with(training={"history": history}), tmp_path / "out", draw=drawn.append)
    assert len(drawn) == 1


def test_a_training_curve_is_the_picture(tmp_path: Path) -> None:
    task = task_with(training={"history": [{"train_top1": i / 9, "val_top1": i / 10} for i in range(9)]})
    result = export_hub(task, tmp_path / "out", draw=lambda path: pytest.fail("the curve is there"))
    assert (tmp_path / "out/picture.png").read_bytes().startswith(PNG)
    assert result.files["picture.png"] < 100_000


def test_without_matplotlib_there_is_no_picture_and_without_the_hubs_package_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: Path) -> None:
        raise ImportError("No module named 'matplotlib'")

    result = export_hub(small_task(), tmp_path / "out", draw=missing)
    assert [note for note in result.notes if "picture.png: that needs matplotlib" in note]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    with pytest.raises(PearStoreError, match=r"needs huggingface_hub: pip install 'pear-adapters\[hub\]'"):
        export_hub(small_task(), tmp_path / "other", Publication(repository="a/b"))


# ---- folders that are there -----------------------------------------------------------------------------------------


def test_an_export_of_the_same_task_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_hub(small_task("dtd"), folder, draw=Path.touch)
    (folder / ".git").mkdir()
    (folder / ".gitattributes").write_text("mine")
    (folder / "peft").mkdir()
    (folder / "peft/adapter_config.json").write_text("of an export before")
    export_hub(small_task("dtd", seed=1), folder)
    assert {path.name for path in folder.iterdir()} == {".git", ".gitattributes", "README.md", "pear.safetensors"}
    with pytest.raises(PearStoreError, match="holds task 'dtd'; name another folder, or --force replaces README.md"):
        export_hub(small_task("svhn"), folder)
    (folder / "pear.safetensors").write_bytes(b"spoilt")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(PearStoreError, match="is not empty; name another folder, or --force"):
        export_hub(small_task("dtd"), folder)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    export_hub(small_task("svhn"), folder, force=True)
    assert (folder / ".gitattributes").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [folder]


def test_no_link_in_a_folder_leads_out_of_it(tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    (outside / "README.md").write_text("mine")
    (folder := tmp_path / "out").mkdir()
    (folder / "README.md").symlink_to(outside / "README.md")
    export_hub(small_task(), folder, force=True)
    assert (outside / "README.md").read_text() == "mine" and not (folder / "README.md").is_symlink()
    (folder / "peft").symlink_to(outside)
    with pytest.raises(PearStoreError, match="peft: expected a folder, found a link; remove the link"):
        export_hub(small_task(), folder, force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PearStoreError, match="exists and is no folder"):
        export_hub(small_task(), tmp_path / "file", force=True)


def test_what_fails_leaves_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "make_card", full)
    with pytest.raises(PearStoreError, match="no space left"):
        export_hub(small_task(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- PEFT, and the way there and back -------------------------------------------------------------------------------


@pytest.fixture
def linear(backbone: Any) -> Task:
    """A task at a Linear of the backbone that is here: one that PEFT's LoRA can say."""
    made = record(
        "linear",
        backbone={"model": backbone.name, "digest": backbone.digest},
        positions={"blocks.0.attn.qkv": [["a0", 0.5]]},
    )
    return make_task(made, {
        "a0.down": floats([[0.1] * 2] * 192), "a0.up": floats([[0.2] * 576] * 2),
        "head.weight": floats([[0.1] * 192] * 2), "head.bias": floats([0.0] * 2),
    })  # fmt: skip


def test_peft_loads_the_folder_beside_a_task_that_is_a_lora(linear: Task, tmp_path: Path) -> None:
    result = export_hub(linear, tmp_path / "out", Publication(license="mit"))
    assert {"peft/adapter_config.json", "peft/adapter_model.safetensors", "peft/pear.json"} <= result.files.keys()
    model = timm.create_model("pear_tiny", pretrained=True, num_classes=2)
    assert PeftModel.from_pretrained(model, str(tmp_path / "out"), subfolder="peft").peft_config
    card = ModelCard.load(tmp_path / "out/README.md")
    assert {"peft", "lora"} <= set(card.data.tags or [])
    assert 'subfolder="peft"' in card.text


def test_why_a_task_is_no_lora_is_said(linear: Task, tmp_path: Path) -> None:
    curved = make_task({**linear.record, "activation": "relu"}, linear.tensors)
    (found,) = (note for note in export_hub(curved, tmp_path / "a").notes if "peft" in note)
    assert "field 'activation': expected 'identity', found 'relu': PEFT's LoRA has no activation" in found
    unknown = make_task({**linear.record, "backbone": {**linear.record["backbone"], "model": "nobody"}}, linear.tensors)
    (found,) = (note for note in export_hub(unknown, tmp_path / "b").notes if "peft" in note)
    assert "no peft/: the backbone cannot be looked at" in found
    assert not (tmp_path / "a/peft").exists()


def test_a_backbone_that_timm_has_from_the_hub_is_the_base_model(
    linear: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"digest": linear.backbone_digest, "head": "head", "linears": {}, "hub": "timm/pear_tiny"}
    monkeypatch.setattr(peft, "describe_backbone", lambda model, weights: said)
    export_hub(linear, tmp_path / "a")
    assert ModelCard.load(tmp_path / "a/README.md").data.base_model == "timm/pear_tiny"
    export_hub(linear, tmp_path / "b", weights="my.safetensors")
    assert ModelCard.load(tmp_path / "b/README.md").data.base_model is None, "these weights came from elsewhere"


def test_what_is_uploaded_comes_back(
    linear: Task, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(linear)
    assert run("--store", store.path, "export-hub", "linear", tmp_path / "out").exit_code == 0
    (tmp_path / "hub").mkdir()
    with running_hub(tmp_path / "hub") as hub, pointed_at(hub, monkeypatch):
        api = HfApi(endpoint=hub.url, token="hf_secret")
        api.create_repo("acme/linear")
        api.upload_folder(folder_path=tmp_path / "out", repo_id="acme/linear")
        with Store.create(tmp_path / "other") as other:
            assert run("--store", other.path, "add", "hf://acme/linear").exit_code == 0
            assert contents(other.get("linear")) == contents(linear)
            assert other.get("linear").record == store.get("linear").record
