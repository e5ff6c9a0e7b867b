"""What lists say of tasks, what they read for it, and what is offered to a shell."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from pear_store import PearStoreError, Store, Task, make_task
from pear_store.cli import main
from pear_store.format.summary import NO_SUMMARY, Origin, Summary
from pear_store.listing import Listing, Query
from pear_store.local import references
from pear_store.local.opened import OpenStore
from pear_store.local.rows import NameRow
from pear_store.sharing import groups, growth, new_bytes, shared_with_others
from tests.helpers.makers import floats, record, sharing_tasks, small_task, tensors
from tests.pear_store.test_cli import run

OTHER = {"model": "vit_small", "digest": "sha256:" + "1" * 64}
LABELS = ["one", "two", "three"]
HEADINGS = "task", "version", "backbone", "classes", "val", "%", "metric", "new", "bytes", "added", "tags"


def made(name: str, seed: int, **changes: Any) -> Task:
    return make_task(record(name, **changes), tensors(seed, classes=len(changes.get("labels", "ab"))))


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """a in two versions that share an adapter, b on another backbone with three classes, c without accuracy, d as a."""
    with Store.create(tmp_path / "s") as store:
        store.add(small_task("a", seed=0))
        store.add(made("b", 1, backbone=OTHER, labels=LABELS, metrics={"val_top1": 0.9}))
        store.add(made("c", 2, metrics={"test_top1": 0.9}))
        store.add(small_task("d", seed=0))
        store.add(small_task("a", seed=0, head__bias=floats([5.0, 5.0])))
        store.tag("a@1", "prod")
        store.tag("b", "next")
    return tmp_path / "s"


def listed(where: Path, *args: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("--store", where, "ls", "--json", *args).stdout)
    return found


def test_a_list_says_what_tasks_are(where: Path) -> None:
    rows = {row["task"]: row for row in listed(where)}
    size = small_task().size_bytes
    assert rows["a"]["bytes"] == size and rows["a"]["new_bytes"] == 8  # the bias alone
    assert rows["a"]["older_tags"] == {"prod": 1} and rows["b"]["tags"] == ["next"]
    assert (rows["b"]["backbone"], rows["b"]["backbone_digest"]) == ("vit_small", OTHER["digest"])
    assert (rows["b"]["classes"], rows["b"]["val_top1"], rows["c"]["val_top1"]) == (3, 0.9, None)
    assert rows["d"]["new_bytes"] == 0
    assert rows["a"]["time_ns"] > rows["d"]["time_ns"]
    table = run("--store", where, "ls").stdout.splitlines()
    assert table[0].split() == [*HEADINGS]
    assert table[3].split()[:8] == [
        "b",
        "1",
        "vit_small",
        "3",
        "90.0",
        "top-1",
        *(f"{rows['b']['bytes']:,}",) * 2,
    ]
    assert table[2].endswith("prod@1") and table[4].split()[4:6] == ["-", "-"]


def test_a_list_shows_the_metric_that_chose_the_weights(where: Path) -> None:
    figures = {"val_top1": 0.2, "val_macro_f1": 0.75, "test_top1": 0.1, "images": 7}
    with Store(where) as store:
        store.add(made("e", 3, metrics=figures, training={"select": "macro_f1"}))
        store.add(made("f", 4, metrics=figures, training={"select": "best"}))
        store.add(made("g", 5, metrics={"val_top1": 0.2}, training={"select": "macro_f1"}))
    rows = {row["task"]: row for row in listed(where)}
    assert rows["e"]["metrics"] == rows["f"]["metrics"] == figures and rows["c"]["metrics"] == {"test_top1": 0.9}
    assert [rows[name]["selected_by"] for name in "efa"] == ["val_macro_f1", "val_top1", "val_top1"]
    assert rows["e"]["val_top1"] == 0.2
    lines = {line.split()[0]: line.split() for line in run("--store", where, "ls").stdout.splitlines()}
    assert (lines["e"][4:7], lines["f"][4:6]) == (["75.0", "macro", "F1"], ["20.0", "top-1"])
    assert lines["g"][4:6] == ["-", "-"]  # never a top-1 under the name of another metric
    assert [row["task"] for row in listed(where, "--sort", "val")] == list("fadebcg")
    assert [row["task"] for row in listed(where, "--sort", "accuracy")] == list("efgadbc")


def test_new_bytes_of_all_versions_are_what_the_store_takes(where: Path) -> None:
    with Store(where) as store:
        for name in ("b", "c"):  # also where the first that had a tensor is gone
            store.add(small_task(name, seed=0))
        store.untag("a@prod")
        store.remove("a@1")
        every = listed(where, "--all")
        assert len(every) == 6
        assert sum(row["new_bytes"] for row in every) == store.stats().unique_bytes
        stages = growth(store.uses(), most=4)
        assert [stage.versions for stage in stages] == [2, 4, 6]
        assert (stages[-1].logical_bytes, stages[-1].unique_bytes) == (
            store.stats().logical_bytes, store.stats().unique_bytes,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ((), "abcd"),
        (("--reverse",), "dcba"),
        (("[ab]", "d"), "abd"),
        (("--backbone", "vit_*"), "b"),
        (("--backbone", "*tiny", "--sort", "accuracy", "--limit", 2), "ad"),
        (("--tag", "prod"), "a"),
        (("--sort", "classes", "--reverse", "--limit", 1), "b"),
        (("--sort", "accuracy"), "adbc"),  # what has none is last
        (("--sort", "accuracy", "--reverse"), "badc"),
        (("--sort", "backbone"), "acdb"),
        (("--sort", "bytes", "--reverse", "--limit", 1), "b"),
        (("--sort", "added"), "bcda"),
        (("--sort", "new"), "dacb"),
        (("x*",), ""),
    ],
)
def test_lists_are_filtered_and_sorted(where: Path, args: tuple[object, ...], names: str) -> None:
    assert "".join(row["task"] for row in listed(where, *args)) == names


def test_all_versions_are_filtered_by_their_own_tags(where: Path) -> None:
    assert [(row["task"], row["version"]) for row in listed(where, "--all", "--tag", "prod")] == [("a", 1)]


def test_a_name_that_is_not_there_is_an_error(where: Path) -> None:
    done = run("--store", where, "ls", "a", "nope")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "no task 'nope' in" in done.stderr
    assert run("--store", where, "ls", "--sort", "colour").exit_code == 2


def test_an_empty_list(tmp_path: Path) -> None:
    Store.create(tmp_path).close()
    assert run("--store", tmp_path, "ls").stdout == ""
    assert listed(tmp_path) == []


class Counting(Store):
    """Counts the records that are read."""

    read = 0

    def summaries(self, versions: Any) -> Iterator[Summary | PearStoreError]:
        for version in (wanted := list(versions)):
            self.read += 1
            assert version in wanted
        return super().summaries(wanted)


def test_only_the_records_that_are_needed_are_read(where: Path) -> None:
    with Counting(where) as store:
        for query, read in (
            (Query(sort="new"), 1), (Query(sort="added"), 2), (Query(sort="accuracy"), 4), (Query(backbone="*"), 4),
        ):  # fmt: skip
            listing = Listing(store)
            rows = listing.rows([next(listing.versions(query))])
            assert next(rows).version
            assert store.read <= read
            store.read = 0


def test_a_short_list_needs_no_record_and_has_the_old_keys(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a record is read")

    monkeypatch.setattr(Store, "summaries", refuse)
    monkeypatch.setattr(Store, "uses", refuse)
    rows = listed(where, "--short")
    assert rows[0] == {"task": "a", "version": 2, "bytes": 152, "older_tags": {"prod": 1}}
    assert rows[2] == {"task": "c", "version": 1, "bytes": 152}
    assert run("--store", where, "ls", "--short").stdout.splitlines()[2].split()[:3] == ["a", "2", "152"]


def test_damage_costs_a_list_only_what_is_damaged(where: Path) -> None:
    with Store(where) as store:
        look = store._open.look

        def damage(view: Any) -> bytes:
            row = view.versions.get("c", 1)
            return bytes(row.manifest)

        key = look(damage)
        store._open.write(lambda view: view.delete("manifests", key))
    done = run("--store", where, "ls", "--json")
    rows = {row["task"]: row for row in json.loads(done.stdout)}
    assert rows["b"]["classes"] == 3 and rows["c"]["classes"] is None and "missing" in rows["c"]["error"]
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["Warning", "Warning"]
    assert "c@1" in done.stderr and "new bytes are not known" in done.stderr
    assert run("--store", where, "ls").exit_code == 0
    shown = run("--store", where, "show", "b")
    assert shown.exit_code == 0 and "what it shares is not known" in shown.stderr


@pytest.mark.parametrize("record", [{}, {"backbone": 3, "labels": {}, "metrics": [], "training": "x"},
                                    {"metrics": {"val_top1": True}}, {"metrics": {"val_top1": float("nan")}},
                                    {"metrics": {"val_top1": "1"}, "training": {"select": []}}])  # fmt: skip
def test_a_strangers_record_says_nothing(record: dict[str, Any]) -> None:
    assert Summary.of(record) == Summary(None, None, None, {}, "val_top1") == NO_SUMMARY
    assert Origin.of(record) == Origin({}, {}, {})


def test_a_share_above_one_is_not_shown() -> None:
    summary = Summary.of({"metrics": {"val_top1": 3}})
    assert (summary.val_top1, summary.val, summary.metrics) == (None, None, {"val_top1": 3})


def test_show_says_how_it_was_trained_and_what_it_shares(where: Path) -> None:
    training = {
        "method": "pear", "ratio": 0.92, "seed": 3, "data": "47 classes, 3,760 images", "data_name": "dtd",
        "data_fingerprint": "ab12", "images": {"train": 3008}, "given": {"bank": ["a"]}, "history": [{"loss": 1.0}],
        "importance": {"blocks.0": 0.1},
    }  # fmt: skip
    with Store(where) as store:
        store.add(make_task(record("e", training=training), tensors(0)))
    shown = run("--store", where, "show", "e").stdout
    assert re_line(shown, "training") == "method=pear ratio=0.92 seed=3"
    assert (
        re_line(shown, "data")
        == 'data=47 classes, 3,760 images data_fingerprint=ab12 data_name=dtd images={"train": 3008}'
    )
    assert re_line(shown, "given") == 'given={"bank": ["a"]}'
    assert re_line(shown, "shared") == "152 bytes (100%) with 2 other tasks: a 152, d 152"
    assert "history" not in shown and "importance" not in shown
    found = json.loads(run("--store", where, "show", "e", "--json").stdout)
    assert found["sharing"]["neighbours"] == [{"task": name, "shared_bytes": 152} for name in "ad"]
    assert found["origin"]["options"] == {"method": "pear", "ratio": 0.92, "seed": 3}
    assert found["manifest"]["training"] == training
    assert re_line(run("--store", where, "show", "b").stdout, "shared") == "nothing with other tasks"
    assert re_line(run("--store", where, "show", "a@1").stdout, "tags") == "prod"


def re_line(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{start} ")]
    return line[len(start) :].strip()


def test_sharing_is_counted_on_tensors(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        for task in sharing_tasks(12):
            store.add(task)
        uses = store.uses()
        tasks = [store.get(use.version.task, copy=False) for use in uses.versions]
    sizes = [{digest: tensor.size_bytes for digest, tensor in task.tensors.items()} for task in tasks]
    seen: set[str] = set()
    for use, own in zip(uses.versions, sizes, strict=True):
        assert new_bytes(uses)[use.version.task, 1] == sum(size for digest, size in own.items() if digest not in seen)
        seen |= own.keys()
    first = shared_with_others(uses, uses.versions[0].version)
    assert first.size_bytes == sum(sizes[0].values())
    assert {one.task: one.shared_bytes for one in first.neighbours} == {
        task.name: sum(sizes[0][digest] for digest in sizes[0].keys() & other)
        for task, other in list(zip(tasks, sizes, strict=True))[1:] if sizes[0].keys() & other
    }  # fmt: skip
    found = groups([use.tensors for use in uses.versions], uses.size_bytes)
    assert sum(group.size_bytes for group in found) == sum({d: s for own in sizes for d, s in own.items()}.values())
    assert found[0].tasks == tuple(
        place
        for place, task in enumerate(tasks)
        if "core0" in task.record["adapters"] or "b0" in task.record["adapters"]
    )
    assert found[0].saved_bytes == found[0].size_bytes * (len(found[0].tasks) - 1)


# ---- completion


def offered(where: Path, *words: str) -> list[str]:
    """What click offers for the last word."""
    args = ["--store", str(where), *words[:-1]]
    completion = ShellComplete(main, {}, "pear-store", "_PEAR_STORE_COMPLETE")
    return [item.value for item in completion.get_completions(args, words[-1])]


def test_a_shell_is_offered_tasks_versions_and_tags(where: Path) -> None:
    assert offered(where, "show", "") == [*"abcd"]
    assert offered(where, "ls", "b") == ["b"]
    assert offered(where, "show", "a@") == ["a@1", "a@2", "a@prod"]
    assert offered(where, "diff", "a@1", "a@p") == ["a@prod"]
    assert offered(where, "tag", "a@2", "p") == ["prod"]
    assert offered(where, "tag", "a@2", "") == ["prod"]
    with Store(where) as store:
        store.remove("c")
        store.untag("a@prod")
    assert offered(where, "rm", "c") == []
    assert offered(where, "show", "a@") == ["a@1", "a@2"]


def test_where_many_tasks_begin_alike_the_next_letters_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "MOST_OFFERED", 3)
    names = ["flower", "flower-ash", "flower-asp", "flower-bay", "Oak", "oat.1"]
    with Store.create(tmp_path) as store:
        for seed, name in enumerate(names):
            store.add(small_task(name, seed=seed))
        assert store.beginning("") == ["f", "O"]
        assert store.beginning("fl") == ["flower", "flower-"]
        assert store.beginning("flower-") == ["flower-ash", "flower-asp", "flower-bay"]
        assert store.beginning("oa") == ["oat.1"]
        assert store.beginning("O") == ["Oak"]
        for text in ("é", "/", "a b", "x" * 300, "nope@", "@", "flower@\x00"):
            assert store.beginning(text) == []


def test_whatever_goes_wrong_a_shell_is_offered_nothing(
    where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert offered(tmp_path / "nowhere", "show", "a") == []
    assert offered(Path("s3://bucket"), "show", "a") == []

    def fail(*_: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(OpenStore, "look", fail)
    assert offered(where, "show", "a") == []
    assert capsys.readouterr() == ("", "")


def test_a_completion_reads_only_names_that_begin_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.create(tmp_path) as store:
        for seed, name in enumerate(["aa", "ab", "b", "c"]):
            store.add(small_task(name, seed=seed))
        read: list[bytes] = []
        decode = NameRow.decode

        def noted(key: bytes, row: bytes) -> NameRow:
            read.append(key)
            return decode(key, row)

        monkeypatch.setattr(NameRow, "decode", noted)
        assert store.beginning("a") == ["aa", "ab"]
        assert read == [b"aa", b"ab"]


def test_a_task_on_bases_has_their_rank_not_the_option_s() -> None:
    assert Origin.of({"training": {"rank": 12, "lr": 0.01}}).options == {"rank": 12, "lr": 0.01}
    on_bases = Origin.of({"training": {"rank": 12, "lr": 0.01, "bases": "plants"}})
    assert (on_bases.given, on_bases.options) == ({"bases": "plants"}, {"lr": 0.01})
