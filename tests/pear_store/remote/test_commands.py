"""The commands that share a store, as a person or a script meets them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pear_store import Store
from pear_store.errors import FormatError, NotFoundError, PearStoreError, PlaceError
from pear_store.remote.directory import DirectoryPlace
from pear_store.remote.remotes import Remote, add_remote, clone_store, find_remote, init_remote, remotes
from tests.helpers.makers import small_task
from tests.helpers.users import as_nobody
from tests.pear_store.remote.test_places import Overwriting
from tests.pear_store.test_cli import run

pytestmark = pytest.mark.slow


@pytest.fixture
def shared(tmp_path: Path) -> tuple[str, ...]:
    """The options of a command on a store with three tasks and the remote "team", which has nothing yet."""
    with Store.create(tmp_path / "s") as store:
        for name in ("dtd", "dtd-small", "svhn"):
            store.add(small_task(name, seed=len(name)))
        store.tag("dtd@1", "prod")
    made = run("--store", tmp_path / "s", "remote", "init", "team", tmp_path / "remote")
    assert made.exit_code == 0 and made.stdout == f"remote team at {tmp_path}/remote\n"
    return ("--store", str(tmp_path / "s"))


def test_push_clone_pull_and_status(shared: tuple[str, ...], tmp_path: Path) -> None:
    assert "to push    dtd@1" in run(*shared, "status").stdout
    pushed = run(*shared, "push")
    assert "pushed dtd@1" in pushed.stdout and "3 versions" in pushed.stdout and not pushed.stderr
    assert run(*shared, "status").stdout == "both hold the same\n"
    cloned = run("clone", tmp_path / "remote", tmp_path / "c", "--json")
    value = json.loads(cloned.stdout)
    assert [row["task"] for row in value["versions"]] == ["dtd", "dtd-small", "svhn"]
    assert value["tags"] == [{"task": "dtd", "tag": "prod"}] and value["read_bytes"] > 0
    clone = ("--store", str(tmp_path / "c"))
    assert json.loads(run(*clone, "ls", "--json").stdout) == json.loads(run(*shared, "ls", "--json").stdout)
    with Store(tmp_path / "c") as store:
        store.add(small_task("new"))
    assert json.loads(run(*clone, "push", "--json").stdout)["versions"] == [{"task": "new", "version": 1}]
    status = json.loads(run(*shared, "status", "team", "--json").stdout)
    assert status["pull"]["versions"] == [{"task": "new", "version": 1}] and not status["clashes"]
    assert "took new@1" in run(*shared, "pull", "team", "new").stdout
    assert json.loads(run(*shared, "remote", "show", "--json").stdout) == {
        "name": "team", "url": f"{tmp_path}/remote", "entries": 2, "tasks": 4, "versions": 4, "packs": 2,
        "pack_bytes": sum(file.stat().st_size for file in (tmp_path / "remote" / "packs").rglob("*.safetensors")),
    }  # fmt: skip
    assert "entries     2" in run(*shared, "remote", "show").stdout


def test_remotes_are_added_listed_and_forgotten(shared: tuple[str, ...], tmp_path: Path) -> None:
    added = run(*shared, "remote", "add", "again", tmp_path / "remote", "--tasks", "dtd*", "--tasks", "x", "--json")
    assert json.loads(added.stdout) == {"name": "again", "url": f"{tmp_path}/remote"}
    listed = json.loads(run(*shared, "remote", "ls", "--json").stdout)
    assert [(row["name"], row["tasks"]) for row in listed] == [("again", ["dtd*", "x"]), ("team", ["*"])]
    assert "dtd* x" in run(*shared, "remote", "ls").stdout
    several = run(*shared, "push")
    assert several.exit_code == 3 and "no remote 'origin'" in several.stderr and "again, team" in several.stderr
    assert run(*shared, "push", "again").exit_code == 0
    assert "forgot remote again" in run(*shared, "remote", "rm", "again").stdout
    assert not list((tmp_path / "s" / "remotes").glob("again*"))
    assert run(*shared, "remote", "rm", "again").exit_code == 3
    taken = run(*shared, "remote", "add", "team", tmp_path / "remote")
    assert taken.exit_code == 1 and "remote 'team' exists; use another name" in taken.stderr


def test_only_the_tasks_that_a_remote_was_added_for_are_pulled(shared: tuple[str, ...], tmp_path: Path) -> None:
    run(*shared, "push")
    run("clone", tmp_path / "remote", tmp_path / "c", "--tasks", "dtd*")
    clone = ("--store", str(tmp_path / "c"))
    assert [row["task"] for row in json.loads(run(*clone, "ls", "--json").stdout)] == ["dtd", "dtd-small"]
    assert run(*clone, "status").stdout == "both hold the same\n"
    assert "0 versions" in run(*clone, "pull").stdout
    assert "took svhn@1" in run(*clone, "pull", "svhn").stdout


def test_each_kind_of_error_has_one_line_and_its_code(shared: tuple[str, ...], tmp_path: Path) -> None:
    run(*shared, "push")
    with Store.create(tmp_path / "other") as store:
        store.add(small_task("dtd", seed=99))
    other = ("--store", str(tmp_path / "other"))
    run(*other, "remote", "add", "team", tmp_path / "remote")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for command, code, text in (
        ((*other, "push"), 13, "dtd@1 is another version on the remote"),
        ((*other, "push", "none"), 3, "no task 'none'"),
        ((*other, "pull", "none"), 3, "no task 'none' there"),
        ((*other, "pull", "svhn@7"), 3, "no version svhn@7"),
        ((*other, "remote", "add", "x", tmp_path / "empty"), 3, "no remote there"),
        ((*other, "remote", "add", "x", tmp_path / "nothing"), 12, "no such directory"),
        ((*other, "remote", "add", "No Name", tmp_path / "remote"), 1, "expected up to 32"),
        ((*other, "remote", "init", "x", tmp_path / "file"), 1, "file"),
        ((*other, "remote", "init", "x", "http://127.0.0.1:9/x"), 12, "only be read"),
        ((*other, "remote", "add", "x", "http://127.0.0.1:9/x"), 12, "refused"),
        ((*other, "remote", "add", "x", "gopher://x"), 12, "expected a directory"),
        ((*other, "remote", "add", "x", "s3://b/x", "--option", "secret_access_key=1"), 12, "secrets are not kept"),
        ((*other, "remote", "add", "x", "s3://b/x", "--option", "region"), 2, "KEY=VALUE"),
        ((*other, "remote", "init", "x", tmp_path / "new", "--option", "a=b"), 12, "a directory has no options"),
        ((*other, "remote", "add", "x", tmp_path / "remote", "--option", "a=b"), 12, "a directory has no options"),
        (("clone", tmp_path / "remote", tmp_path / "c", "--option", "a=b"), 12, "a directory has no options"),
        ((*other, "status", "none"), 3, "no remote 'none'"),
        (("clone", tmp_path / "empty", tmp_path / "c"), 3, "no remote there"),
        (("clone", tmp_path / "remote", tmp_path / "other2" / ".." / "empty" / ".." / "other"), 1, "no clone"),
    ):
        done = run(*command)
        assert done.exit_code == code, (command, done.output)
        assert text in done.stderr, (command, done.stderr)
        if code != 2:
            assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "new").exists()
    assert "1@1" not in run(*other, "remote", "ls").stdout
    pulled = run(*other, "pull")
    assert "dtd@1 of yours is dtd@2 now: another store has pushed number 1" in pulled.stdout
    assert run(*other, "push").exit_code == 0


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_a_store_without_a_remote_says_how_to_get_one(tmp_path: Path, verb: str) -> None:
    Store.create(tmp_path / "s").close()
    for given in ((), ("team",), ("dtd",)):
        refused = run("--store", tmp_path / "s", verb, *given)
        assert refused.exit_code == 3 and len(refused.stderr.splitlines()) == 1
        assert "its remotes: none; 'pear-store remote init NAME URL' makes one" in refused.stderr


def test_a_clone_that_was_cut_off_goes_on(shared: tuple[str, ...], tmp_path: Path) -> None:
    run(*shared, "push")
    pack = next((tmp_path / "remote" / "packs").rglob("*.safetensors"))
    pack.rename(tmp_path / "away")
    failed = run("clone", tmp_path / "remote", tmp_path / "c")
    assert failed.exit_code == 3 and "there is no packs/" in failed.stderr
    (tmp_path / "away").rename(pack)
    assert run("clone", tmp_path / "remote", tmp_path / "c").exit_code == 0
    assert "0 versions" in run("clone", tmp_path / "remote", tmp_path / "c").stdout
    (tmp_path / "remote2").mkdir()
    run(*shared, "remote", "init", "second", tmp_path / "remote2")
    assert "a clone of" in run("clone", tmp_path / "remote2", tmp_path / "c").stderr


def test_a_store_on_s3(shared: tuple[str, ...], tmp_path: Path, s3_options: dict[str, str]) -> None:
    options = [text for key, value in s3_options.items() for text in ("--option", f"{key}={value}")]
    url = f"s3://bucket/{tmp_path.name}-{os.urandom(4).hex()}"
    assert run(*shared, "remote", "init", "s3", url, *options).exit_code == 0
    assert run(*shared, "push", "s3").exit_code == 0
    assert run("clone", url, tmp_path / "c", *options).exit_code == 0
    with Store(tmp_path / "c") as clone, Store(shared[1]) as store:
        assert clone.versions() == store.versions()


def test_a_store_on_a_web_server(shared: tuple[str, ...], tmp_path: Path, serve: Callable[..., str]) -> None:
    run(*shared, "push")
    url = serve(tmp_path / "remote")
    assert run("clone", url, tmp_path / "c").exit_code == 0
    with Store(tmp_path / "c") as clone, Store(shared[1]) as store:
        assert clone.versions() == store.versions()
        clone.add(small_task("new"))
        with pytest.raises(PlaceError, match="only be read"):
            clone.push()


def test_init_refuses_a_place_that_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_store.remote.remotes.open_place", lambda url, options: Overwriting())
    with pytest.raises(PlaceError, match="would lose what others push"):
        init_remote("s3://bucket/x")


def test_a_place_that_began_to_overwrite_is_refused_at_the_first_push(
    shared: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Overwriting()
    source = DirectoryPlace(tmp_path / "remote")
    place.objects["pear-remote.json"] = source.get("pear-remote.json", 1000)
    monkeypatch.setattr("pear_store.remote.remotes.open_place", lambda url, options: place)
    with Store(shared[1]) as store, pytest.raises(PlaceError, match="would lose what others push"):
        store.push()
    assert list(place.objects) == ["pear-remote.json"]


def test_a_remote_that_is_there_is_kept(tmp_path: Path) -> None:
    first = init_remote(str(tmp_path / "r"))
    assert init_remote(str(tmp_path / "r")) == first
    assert sorted(file.name for file in (tmp_path / "r").rglob("*") if file.is_file()) == ["pear-remote.json"]


def test_what_lies_in_remotes_is_not_believed(shared: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "s" / "remotes"
    for text in ("", "[]", "{" * 1000, '{"format": "pear-remotes/2"}', '{"format": "pear-remotes/1", "url": 5}'):
        (folder / "bad.json").write_text(text)
        with pytest.raises(FormatError, match="bad.json"):
            remotes(tmp_path / "s")
    (folder / "bad.json").unlink()
    (folder / "link.json").symlink_to(folder / "team.json")
    with pytest.raises(FormatError, match="a link"):
        remotes(tmp_path / "s")
    (folder / "link.json").unlink()
    (folder / "team.mirror").unlink(missing_ok=True)
    os.mkfifo(folder / "team.mirror")
    with Store(tmp_path / "s") as store, pytest.raises(FormatError, match="a pipe"):
        store.push()
    (folder / "Not A Name.json").write_text("")
    assert [one.name for one in remotes(tmp_path / "s")] == ["team"]


def test_the_status_of_a_store_that_may_only_be_read(shared: tuple[str, ...], tmp_path: Path) -> None:
    for path in [tmp_path / "s", *(tmp_path / "s").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)

    def look() -> None:
        assert "to push" in run(*shared, "status").stdout
        refused = run(*shared, "push")
        assert refused.exit_code and "Permission denied" in refused.stderr.replace("permission", "Permission")

    if os.geteuid():
        look()
        return
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    as_nobody(look)  # root may write everything


def test_no_secret_is_kept_or_said(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        for url in ("https://user:geheim@host/x", "sftp://user:geheim@host/x"):
            with pytest.raises(PlaceError) as found:
                add_remote(store.path, Remote("r", url))
            assert "geheim" not in str(found.value)
        with pytest.raises(PearStoreError):
            add_remote(store.path, Remote("r", "s3://b/x", {"secret_access_key": "geheim"}))
        with pytest.raises(NotFoundError, match="its remotes: none"):
            find_remote(store.path, None)
    assert not [file for file in (tmp_path / "s").rglob("*") if file.is_file() and b"geheim" in file.read_bytes()]


def test_clone_from_python(shared: tuple[str, ...], tmp_path: Path) -> None:
    run(*shared, "push")
    result = clone_store(tmp_path / "c", Remote("origin", str(tmp_path / "remote")))
    assert len(result.versions) == 3


def test_a_remotes_upkeep(shared: tuple[str, ...], tmp_path: Path) -> None:
    run(*shared, "push")
    with Store(shared[1]) as store:
        for seed in range(20, 24):
            store.add(small_task("svhn", seed=seed))
    run(*shared, "push")
    log = json.loads(run(*shared, "remote", "log", "--json").stdout)
    assert [entry["number"] for entry in log] == [2, 1] and log[0]["packs"] == 1
    assert log[0]["versions"] == [{"task": "svhn", "version": number} for number in range(2, 6)]
    assert log[1]["tags"] == [{"task": "dtd", "tag": "prod", "version": 1}]
    assert "added svhn@2, svhn@3, svhn@4, svhn@5" in run(*shared, "remote", "log", "team", "-n", "1").stdout
    planned = json.loads(run(*shared, "remote", "gc", "--keep", "1", "--dry-run", "--json").stdout)
    assert len(planned["removed"]) == 4 and planned["dry_run"]
    assert run(*shared, "remote", "gc", "--keep", "1").exit_code == 1, "it asks first"
    done = json.loads(run(*shared, "remote", "gc", "--keep", "1", "--grace", "0s", "--yes", "--json").stdout)
    assert done["removed"] == planned["removed"] and done["deleted"] == done["dropped_packs"] == 1
    assert "dropped 0 packs" in run(*shared, "remote", "gc").stdout
    assert "removed svhn@1" in run(*shared, "pull").stdout
    assert "all good" in run(*shared, "remote", "verify", "team").stdout
    found = (tmp_path / "remote" / "packs").rglob("*.safetensors")
    pack = max(found, key=lambda file: file.stat().st_mtime_ns)  # what gc wrote: all in it is needed
    data = pack.read_bytes()
    pack.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    bad = run(*shared, "remote", "verify", "--json")
    assert bad.exit_code == 5
    (fault,) = json.loads(bad.stdout)["faults"]
    assert fault["what"].endswith(pack.name) and fault["tasks"] and fault["versions"]
    assert f"{pack.name}: 1 of its tensors" in run(*shared, "remote", "verify").stdout
    Store.create(tmp_path / "empty").close()
    run("--store", tmp_path / "empty", "remote", "add", "team", tmp_path / "remote")
    unmended = run("--store", tmp_path / "empty", "remote", "repair")
    assert unmended.exit_code == 5 and "hits" in unmended.stdout
    mended = run("--store", tmp_path / "empty", "remote", "repair", "--from", shared[1], "--json")
    assert mended.exit_code == 0 and json.loads(mended.stdout)["healed"] == 1
    assert run(*shared, "remote", "verify").exit_code == 0
    entry = tmp_path / "remote" / "log" / f"{1:020d}"
    entry.unlink()
    assert f"put back log/{entry.name}" in run(*shared, "remote", "repair").stdout
    for command, code, text in (
        (("gc", "nobody"), 3, "no remote 'nobody'"),
        (("verify", "--subset", "3/2"), 2, "expected n/t"),
        (("gc", "--grace", "week"), 2, "expected a number"),
        (("repair", "--from", tmp_path / "nothing"), 3, "no store there; nothing was repaired"),
    ):
        refused = run(*shared, "remote", *command)
        assert refused.exit_code == code and text in refused.stderr, refused.output


def test_a_remote_on_a_web_server_is_verified_and_never_written(
    shared: tuple[str, ...], tmp_path: Path, serve: Callable[..., str]
) -> None:
    run(*shared, "push")
    run("clone", serve(tmp_path / "remote"), tmp_path / "c")
    clone = ("--store", str(tmp_path / "c"))
    assert "all good" in run(*clone, "remote", "verify").stdout
    assert "added" in run(*clone, "remote", "log").stdout
    for verb in ("gc", "repair"):
        refused = run(*clone, "remote", verb)
        assert refused.exit_code == 12 and "only be read" in refused.stderr and refused.stderr.count("\n") == 1
