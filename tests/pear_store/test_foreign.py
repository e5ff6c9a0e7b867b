"""A stranger's LoRA folder, labels file or preprocessing: what is wrong gives one of our errors, in bounded time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pear_store import CheckpointError, PearStoreError, RawTensor, SourceError
from pear_store.exchange.peft import import_peft, read_labels
from pear_store.format.container import container_chunks
from tests.helpers.makers import container, floats, record
from tests.pear_store.test_cli import run

PREFIX = "base_model.model."
IDENTITY = {"model": "pear_tiny", "digest": "sha256:" + "0" * 64}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["qkv"],
    "modules_to_save": ["head"],
    "rank_pattern": {},
    "alpha_pattern": {},
}
SIDECAR: dict[str, Any] = {
    "task": "trees",
    "backbone": IDENTITY,
    "labels": ["oak", "elm"],
    "preprocess": record()["preprocess"],
    "metrics": {},
    "training": {},
}


def lora_folder(where: Path, config: Any = CONFIG, sidecar: Any = SIDECAR, **tensors: RawTensor) -> Path:
    """A LoRA at two positions with a classifier of two classes."""
    where.mkdir(exist_ok=True)
    weights = {"head.weight": floats([[1.0, 2.0], [3.0, 4.0]]), "head.bias": floats([0.0, 1.0])}
    for position in ("blocks.0.attn.qkv", "blocks.1.attn.qkv"):
        weights |= {f"{position}.lora_A.weight": floats([[1.0, 2.0]] * 2)}
        weights |= {f"{position}.lora_B.weight": floats([[1.0, 2.0]] * 6)}
    weights |= tensors
    (where / "adapter_config.json").write_text(json.dumps(config))
    (where / "pear.json").write_text(json.dumps(sidecar))
    named = {PREFIX + name: tensor for name, tensor in weights.items()}
    (where / "adapter_model.safetensors").write_bytes(b"".join(container_chunks(named, {})))
    return where


SLOW = ("a?" * 60, ".*" * 20 + "x", r"\w*" * 30 + "!", "(a|aa)" * 33, "(a*)*" * 20 + "b", "a{1,99}" * 20 + "x")


def test_no_pattern_takes_longer_than_its_length(tmp_path: Path) -> None:
    names = {f"blocks.{'a' * 60}{i}.{side}.weight": floats([[1.0, 2.0]] * 2) for i in range(20)
             for side in ("lora_A", "lora_B")}  # fmt: skip
    patterns = dict.fromkeys(SLOW, 3.0)
    folder = lora_folder(tmp_path / "lora", {**CONFIG, "rank_pattern": {}, "alpha_pattern": patterns}, **names)
    code = f"from pear_store.exchange.peft import import_peft; print(len(import_peft({str(folder)!r}).positions))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.stdout == "22\n", done.stderr


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"a{1000}" * 28: 3}, "that RE2 takes"),
        ({"((a{0,90}){0,90}){0,90}": 3}, "that RE2 takes"),
        ({"(": 3}, "that RE2 takes"),
        ({"a" * 201: 3}, "at most 200 characters"),
        ({f"x{i}": 3 for i in range(1001)}, "at most 1000 patterns"),
    ],
)
def test_patterns_that_are_too_much_are_refused(patterns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"field 'alpha_pattern': expected .*{message}"):
        import_peft(lora_folder(tmp_path / "lora", {**CONFIG, "alpha_pattern": patterns}))


@pytest.mark.parametrize("shape", [(1 << 37, 0), (0, 2), (0, 0), (1 << 47, 0)])
def test_an_empty_classifier_allocates_nothing(shape: tuple[int, int], tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "lora")
    tensors = {
        f"{PREFIX}q.lora_A.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        f"{PREFIX}q.lora_B.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]},
        f"{PREFIX}head.weight": {"dtype": "F32", "shape": list(shape), "data_offsets": [16, 16]},
    }
    (folder / "adapter_model.safetensors").write_bytes(container(json.dumps(tensors), bytes(16)))
    with pytest.raises(CheckpointError, match=r"'head': expected weight \[classes, d\]"):
        import_peft(folder)


# text is of all of Unicode, half surrogate pairs and control characters included, which JSON can escape
text = st.text(max_size=8) | st.sampled_from(["\ud800", "\x1b[2J", "a\nb", "9" * 5000, "", "head"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, 0, 1e308, -0.0, 5e-324]) | text,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(text, children, max_size=3),
    max_leaves=6,
)


def swapped(value: dict[str, Any]) -> st.SearchStrategy[Any]:
    """The object with some fields, or all of it, replaced by anything."""
    return (
        st.dictionaries(st.sampled_from(sorted(value)) | text, anything, max_size=3).map(lambda x: value | x) | anything
    )


@pytest.mark.slow
@settings(max_examples=300)
@given(config=swapped(CONFIG), sidecar=swapped(SIDECAR) | st.just(SIDECAR))
def test_whatever_the_json_says_the_error_is_ours(
    tmp_path_factory: pytest.TempPathFactory, config: Any, sidecar: Any
) -> None:
    folder = lora_folder(tmp_path_factory.getbasetemp() / "fuzzed", config, sidecar)
    try:
        assert import_peft(folder).positions
    except PearStoreError as error:
        assert "\n" not in str(error)


@pytest.mark.slow
@settings(max_examples=200)
@given(name=text, tail=st.sampled_from([".lora_A.weight", ".lora_B.weight", ".weight", ""]), rows=st.integers(0, 3))
def test_whatever_tensors_are_called_the_error_is_ours(
    tmp_path_factory: pytest.TempPathFactory, name: str, tail: str, rows: int
) -> None:
    folder = lora_folder(tmp_path_factory.getbasetemp() / "named")
    tensors = {
        f"{PREFIX}{name}{tail}": {"dtype": "F32", "shape": [rows, 2], "data_offsets": [0, 8 * rows]},
        f"{PREFIX}q.lora_A.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8 * rows, 8 * rows + 8]},
        f"{PREFIX}q.lora_B.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8 * rows + 8, 8 * rows + 16]},
    }
    (folder / "adapter_model.safetensors").write_bytes(container(json.dumps(tensors), bytes(8 * rows + 16)))
    try:
        import_peft(folder, features_only=True)
    except PearStoreError as error:
        assert "\n" not in str(error)


@pytest.mark.slow
@settings(max_examples=200)
@given(
    content=st.binary(max_size=40) | st.text(max_size=20).map(str.encode),
    which=st.sampled_from(["adapter_config.json", "pear.json", "adapter_model.safetensors"]),
)
def test_whatever_the_bytes_are_the_error_is_ours(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, which: str
) -> None:
    folder = lora_folder(tmp_path_factory.getbasetemp() / "bytes")
    (folder / which).write_bytes(content)
    with pytest.raises(PearStoreError):
        import_peft(folder)


def test_labels_with_a_mark_windows_lines_and_no_last_line(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(b"\xef\xbb\xbfoak\r\n\xc3\xa9rable\r\nash \xe2\x80\xa8 tree")
    assert read_labels(tmp_path / "labels") == ["oak", "érable", "ash \u2028 tree"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("oak\nérable\n".encode("latin-1"), r"line 2: byte 0xe9 is not UTF-8; .*iconv -f latin1 -t utf-8"),
        ("oak\nelm\n".encode("utf-16"), "is UTF-16: expected UTF-8; save it as UTF-8"),
        (b"oak\n\nelm\n", "line 2 is empty"),
        (b"oak\nel\x1b[2Jm\n", r"line 2 is 'el\\x1b\[2Jm': expected a class name without control"),
        (b"\x89PNG\r\n\x1a\n", "line 1: byte 0x89 is not UTF-8"),
        (b"a\n" * (9 << 20), "more than 16777216 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ],
)
def test_labels_that_are_no_text_say_where(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_labels(tmp_path / "labels")


def test_option_files_give_one_line(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "lora", sidecar={k: SIDECAR[k] for k in ("task", "backbone")})
    (tmp_path / "labels").write_text("oak\nelm\n")
    (tmp_path / "good.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(SIDECAR["preprocess"]).encode())
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    store = ("--store", tmp_path / "s")
    run(*store, "init")
    labels = ("--labels", tmp_path / "labels")
    for options, code, message in (
        (("--labels", tmp_path), 10, "a directory: expected a file"),
        (("--labels", tmp_path / "gone"), 3, "no such file"),
        (labels, 4, "--preprocess timm for the model's own, or a JSON file"),
        ((*labels, "--preprocess", tmp_path), 10, "a directory"),
        ((*labels, "--preprocess", tmp_path / "deep.json"), 10, "not valid JSON: nested too deeply"),
        ((*labels, "--preprocess", tmp_path / "list.json"), 4, "field 'preprocess': expected an object"),
        ((*labels, "--preprocess", tmp_path / "latin.json"), 10, "line 1: byte 0xe9"),
        ((*labels, "--preprocess", "timm"), 2, "give --backbone MODEL"),
    ):
        done = run(*store, "import-peft", folder, *options)
        assert (done.exit_code, message in done.stderr) == (code, True), done.output
        assert done.stderr.count("Error: ") == 1 and "Traceback" not in done.output
    done = run(*store, "import-peft", folder, *labels, "--preprocess", tmp_path / "good.json")
    assert "added trees@1" in done.stdout, done.output
    done = run(*store, "import-peft", folder, *labels, "--preprocess", "timm", "--backbone", "pear_tiny")
    assert "field 'backbone': expected pear_tiny" in done.stderr, done.output
