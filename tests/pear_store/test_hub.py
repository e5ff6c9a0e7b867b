"""Tasks that lie on a Hugging Face Hub: the real client, and a Hub of this machine."""

import json
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pear_store import Access, NotFoundError, SourceError, Store, read_source, write_checkpoint
from pear_store.local import hub as reading
from tests.helpers.fake_hub import FakeHub, pointed_at, run_against, running_hub
from tests.helpers.makers import small_task
from tests.pear_store.test_cli import run
from tests.pear_store.test_store import contents

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """With acme/dtd: its main branch, a tag v1, a pull request, and a folder of another task."""
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with running_hub(tmp_path / "hub") as found, pointed_at(found, monkeypatch):
        for seed, revision in enumerate(("main", "v1", "refs_pr_1")):
            (folder := found.folder / f"acme/dtd@{revision}").mkdir(parents=True)
            write_checkpoint(folder / "pear.safetensors", small_task("dtd", seed=seed))
        (found.folder / "acme/dtd@main/peft").mkdir()
        (found.folder / "acme/dtd@main/peft/adapter_model.safetensors").write_bytes(b"a LoRA")
        (found.folder / "acme/dtd@main/more").mkdir()
        write_checkpoint(found.folder / "acme/dtd@main/more/pear.safetensors", small_task("more", seed=9))
        write_checkpoint(found.folder / "acme/dtd@main/named.safetensors", small_task("named", seed=8))
        yield found


@pytest.mark.parametrize(
    ("url", "name", "seed"),
    [
        ("hf://acme/dtd", "dtd", 0),
        ("hf://acme/dtd/", "dtd", 0),
        ("hf://acme/dtd@v1", "dtd", 1),
        ("hf://acme/dtd@refs/pr/1", "dtd", 2),
        ("hf://acme/dtd@v1/pear.safetensors", "dtd", 1),
        ("hf://acme/dtd/more", "more", 9),
        ("hf://acme/dtd/named.safetensors", "named", 8),
    ],
)
def test_a_task_comes_from_the_hub(hub: FakeHub, store: Store, url: str, name: str, seed: int) -> None:
    assert store.add(url).task == name
    assert contents(store.get(name)) == contents(small_task(name, seed=seed))
    assert not [path for path in hub.paths("GET") if "/tree/" in path], "no folder is listed"


def test_the_command_takes_a_task_from_the_hub_and_follows_its_newest_commit(hub: FakeHub, store: Store) -> None:
    added = run("--store", store.path, "add", "hf://acme/dtd", "--json")
    assert [(row["task"], row["version"]) for row in json.loads(added.output)] == [("dtd", 1)]
    write_checkpoint(hub.folder / "acme/dtd@main/pear.safetensors", small_task("dtd", seed=5))
    assert "added dtd@2" in run("--store", store.path, "add", "hf://acme/dtd").output
    assert "unchanged" in run("--store", store.path, "add", "hf://acme/dtd").output


def test_what_is_not_there_is_said_in_a_line(hub: FakeHub, store: Store) -> None:
    hub.gated.add("acme/gated")
    hub.private["acme/private"] = "hf_secret"
    for name in ("gated", "private", "empty"):
        (hub.folder / f"acme/{name}@main").mkdir()
    said = {
        "hf://acme/none": "no such repository; if it is private, log in with 'hf auth login' or set HF_TOKEN",
        "hf://acme/private": "no such repository; if it is private",
        "hf://acme/dtd@v9": "no such revision",
        "hf://acme/empty": r"hf://acme/empty/pear.safetensors: no such file",
        "hf://acme/dtd/none.safetensors": "no such file",
    }
    for url, message in said.items():
        with pytest.raises(NotFoundError, match=message):
            store.add(url)
    with pytest.raises(SourceError, match="the repository is gated: ask for access"):
        store.add("hf://acme/gated")
    with pytest.raises(SourceError, match="cannot be read: Repository id must be 'namespace/name'"):
        read_source("hf://gpt2")
    with pytest.raises(SourceError, match="expected a file, found a folder"):
        read_source("hf://acme/dtd/more")
    failed = run("--store", store.path, "add", "hf://acme/none")
    assert failed.exit_code == 3
    assert len(failed.output.splitlines()) == 1


@pytest.mark.slow
def test_a_token_of_the_environment_opens_a_private_repository_and_stays_at_the_hub(hub: FakeHub, store: Store) -> None:
    shutil.copytree(hub.folder / "acme/dtd@v1", hub.folder / "acme/private@main")
    hub.private["acme/private"] = "hf_secret"
    hub.requests.clear()
    given = ["add", "hf://acme/private", "--store", str(store.path)]
    command = [sys.executable, "-c", "from pear_store.cli import main; main()", *given]
    done = run_against(hub, command, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    tokens = {path.split("/")[1]: token for _, path, token in hub.requests}
    assert tokens == {"api": "Bearer hf_secret", "acme": "Bearer hf_secret", "cdn": None}


# ---- a stranger's repository ----------------------------------------------------------------------------------------


def test_what_claims_to_be_large_is_refused_before_a_byte_is_asked_for(hub: FakeHub, store: Store) -> None:
    hub.sizes["pear.safetensors"] = 5 * 1024**3
    with pytest.raises(SourceError, match="more than 4294967296 bytes: larger files are not read"):
        store.add("hf://acme/dtd")
    assert not [path for path in hub.paths("GET") if "resolve" in path]


def test_what_claims_to_be_small_and_never_ends_is_read_up_to_the_limit(hub: FakeHub) -> None:
    hub.endless.add("pear.safetensors")
    tracemalloc.start()
    with pytest.raises(SourceError, match="more than 4000000 bytes"):
        read_source("hf://acme/dtd/pear.safetensors", most_bytes=4_000_000)
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()
    assert hub.sent < 100_000_000


def test_what_is_no_checkpoint_is_refused_as_a_file_would_be(hub: FakeHub, store: Store) -> None:
    file = hub.folder / "acme/dtd@main/pear.safetensors"
    good = file.read_bytes()
    for bad in (b"", b"\x80\x04pickle", good[:-1], good[:200] + b"\xff" + good[201:]):
        file.write_bytes(bad)
        assert run("--store", store.path, "add", "hf://acme/dtd").exit_code == 4
    assert store.tasks() == []


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[]", b'{"id": 1, "siblings": {"a": 1}}', b"\xff\xff"])
def test_strange_answers_of_the_hub_are_errors_in_a_line(hub: FakeHub, store: Store, answer: bytes) -> None:
    hub.answers["/api/models/acme/dtd"] = answer
    found = run("--store", store.path, "add", "hf://acme/dtd")
    assert found.exit_code in (0, 10)  # what the client does not need, it does not look at
    assert len(found.output.splitlines()) == 1
    assert len(store.tasks()) == (found.exit_code == 0)


def test_a_chain_or_a_confined_reader_opens_nothing_of_the_hub(hub: FakeHub, store: Store, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a chain of URLs is not opened unless allowed"):
        store.add("simplecache::hf://acme/dtd/pear.safetensors")
    with pytest.raises(SourceError, match="a URL: only files below"):
        store.add("hf://acme/dtd", access=Access(root=tmp_path))
    assert hub.requests == []


def test_without_the_package_the_extra_is_named(hub: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"needs the package huggingface_hub: pip install 'pear-adapters\[hub\]'"):
        reading.read_hub("hf://acme/dtd/pear.safetensors", 100)


def test_of_a_folder_for_the_hub_only_the_task_is_added(hub: FakeHub, store: Store) -> None:
    folder = hub.folder / "acme/dtd@main"
    for place in (str(folder), f"file://{folder}"):
        assert run("--store", store.path, "add", place).exit_code == 0
        assert [version.task for version in store.tasks()] == ["dtd", "more", "named"]
    (folder / "pear.safetensors").unlink()  # without a task beside it, it is a file like any other
    for place in (str(folder), f"file://{folder}"):
        refused = run("--store", store.path, "add", place)
        assert (refused.exit_code, "adapter_model" in refused.output) == (4, True)
