"""pear-eval: figures are scikit-learn's, mistakes cost a line, a report holds nothing of a stranger's but text."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, classification_report, confusion_matrix, top_k_accuracy_score

from pear_store import Store, Task, make_task, write_checkpoint
from pear_train.data import Labelled, Split, open_labelled
from pear_train.evaluation.answers import Subject
from pear_train.evaluation.cli import GATE_FAILED, main
from pear_train.evaluation.compare import compare
from pear_train.evaluation.evaluated import evaluate
from pear_train.evaluation.figures import BINS, figures
from pear_train.evaluation.gate import Gate
from pear_train.evaluation.report import make_report
from pear_train.evaluation.sample import choose
from router import Backbone, Limits, Router

CLASSES = [f"t-{i}" for i in range(7)]


@pytest.fixture(autouse=True)
def _backbone_is_loaded(backbone_is_loaded: None) -> None:
    pass


@pytest.fixture
def work(tmp_path: Path, task_maker: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store `s` with two versions of task t, and pictures of its classes in folder `new`."""
    with Store.create(tmp_path / "s") as store:
        for seed in (1, 2):
            store.add(task_maker("t", seed=seed, classes=len(CLASSES)))
        store.tag("t@1", "prod")
        store.add(task_maker("features", seed=3, headless=True))
    rng = np.random.default_rng(0)
    for label in CLASSES:
        (tmp_path / "new" / label).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "new" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEAR_STORE", "s")
    return tmp_path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def told(*args: object) -> dict[str, Any]:
    done = run(*args, "--json")
    assert done.exit_code == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def guesses(images: int = 400, classes: int = 8, seed: int = 0) -> tuple[Any, Any]:
    """Classes and probabilities, right more often than not; the last class has no images."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes - 1, images)
    logits = rng.normal(size=(images, classes)) + 2.2 * np.eye(classes)[targets]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return targets, probabilities.astype(np.float32)


def test_figures_are_those_of_scikit_learn() -> None:
    targets, probabilities = guesses()
    labels = [f"c{i}" for i in range(8)]
    found = figures(labels, targets, probabilities)
    predicted = probabilities.argmax(1)
    assert found.top1 == pytest.approx((predicted == targets).mean())
    assert found.top1_low < found.top1 < found.top1_high
    assert found.top5 == pytest.approx(top_k_accuracy_score(targets, probabilities, k=5, labels=range(8)))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(targets, predicted))
    report = classification_report(
        targets, predicted, labels=range(8), target_names=labels, output_dict=True, zero_division=0
    )
    for one in found.classes[:7]:
        expected = report[one.label]
        assert (one.precision, one.recall, one.f1, one.images) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"], expected["support"])
        )
    assert found.classes[7].images == 0 and found.classes[7].recall is None
    assert found.confusion == confusion_matrix(targets, predicted, labels=range(8)).tolist()
    assert sum(count for _, _, count in found.confused()) == int((predicted != targets).sum())


def test_the_calibration_error_is_that_of_a_plain_loop() -> None:
    targets, probabilities = guesses(seed=1)
    found = figures([str(i) for i in range(8)], targets, probabilities)
    error = 0.0
    confidence, right = probabilities.max(1).astype(float), probabilities.argmax(1) == targets
    for i in range(BINS):
        within = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        if within.any():
            error += within.mean() * abs(right[within].mean() - confidence[within].mean())
    assert found.ece == pytest.approx(error)
    assert sum(one.images for one in found.reliability) == 400


def test_a_threshold_answers_fewer_images_and_the_wanted_one_is_the_lowest() -> None:
    targets, probabilities = guesses(seed=2)
    found = figures([str(i) for i in range(8)], targets, probabilities)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    for point in found.coverage:
        answered = confidence >= point.threshold
        assert point.coverage == pytest.approx(answered.mean())
        assert point.accuracy == (pytest.approx(right[answered].mean()) if answered.any() else None)
    best = found.wanted[0.95]
    assert best is not None and best.accuracy is not None and best.accuracy >= 0.95
    for lower in np.unique(confidence[confidence < best.threshold]):
        assert right[confidence >= lower].mean() < 0.95
    assert found.most_confident[-1].coverage == 1 and found.most_confident[-1].accuracy == pytest.approx(found.top1)


def test_a_task_that_is_never_right_or_always() -> None:
    targets = np.array([0, 1, 1])
    wrong = figures(["a", "b"], targets, np.array([[0.4, 0.6], [0.7, 0.3], [1, 0]], np.float32))
    assert (wrong.top1, wrong.top5, wrong.balanced_accuracy, wrong.wanted[0.99]) == (0, None, 0, None)
    right = figures(["a", "b"], targets, np.array([[0.6, 0.4], [0.3, 0.7], [0, 1]], np.float32))
    assert (right.top1, right.confused(), right.macro_f1) == (1, [], 1)


def test_mcnemar_s_exact_test() -> None:
    before = np.array([True] * 15 + [False] * 5 + [True] * 30 + [False] * 2)
    after = np.array([False] * 15 + [True] * 5 + [True] * 30 + [False] * 2)
    found = compare("a", "b", before, after, np.ones(52, bool))
    assert found.p_value == pytest.approx(0.04138947, abs=1e-8)  # as R's binom.test(5, 20) says
    assert (len(found.better), len(found.worse), found.both_right, found.both_wrong) == (5, 15, 30, 2)
    assert found.top1_change == pytest.approx(-10 / 52)
    assert compare("a", "b", before, before, np.zeros(52, bool)).p_value == 1


def test_a_stored_task_answers_as_the_router_does(work: Path, backbone: Backbone) -> None:
    found = told("t", "--data", "new")
    files = sorted((work / "new").rglob("*.png"))
    labels = Router(backbone, work / "s").run(files, "t").labels
    names = [file.parent.name for file in files]
    (task,) = found["tasks"]
    assert (task["task"], task["version"], found["images"], found["split"]) == ("t@2", 2, 28, "all")
    assert task["top1"] == pytest.approx(np.mean([a == b for a, b in zip(labels, names, strict=True)]))
    for was, truth in zip(labels, names, strict=True):
        assert task["confusion"][CLASSES.index(truth)][CLASSES.index(str(was))] > 0
    wrong = {f"{file.parent.name}/{file.name}" for file, was, truth in zip(files, labels, names, strict=True)
             if was != truth}  # fmt: skip
    assert {
        mistake["image"] for mistake in told("t", "--data", "new", "--mistakes", 99)["tasks"][0]["mistakes"]
    } == wrong
    shares = [mistake["probability"] for mistake in task["mistakes"]]
    assert shares == sorted(shares, reverse=True)


def test_names_decide_not_the_order_of_classes(work: Path) -> None:
    whole = told("t", "--data", "new")["tasks"][0]
    for label in CLASSES[:3]:
        shutil.rmtree(work / "new" / label)
    part = told("t", "--data", "new")["tasks"][0]
    assert [one["images"] for one in part["classes"]] == [0, 0, 0, 4, 4, 4, 4]
    assert part["confusion"][3:] == whole["confusion"][3:]


@pytest.mark.slow
def test_two_versions_and_a_checkpoint_side_by_side(work: Path) -> None:
    with Store(work / "s") as store:
        store.export("t@2", "file.safetensors")
    found = told("t@prod", "t@2", "./file.safetensors", "--data", "new")
    assert [task["task"] for task in found["tasks"]] == ["t@prod", "t@2", "file.safetensors"]
    first, second = found["comparisons"]
    assert (first["before"], first["after"]) == ("t@prod", "t@2")
    assert second["better"] == first["better"] and second["p_value"] == first["p_value"]
    change = (len(first["better"]) - len(first["worse"])) / 28
    assert found["tasks"][1]["top1"] - found["tasks"][0]["top1"] == pytest.approx(change)
    for image in first["better"]:
        assert image["after"] == image["label"] != image["before"]
    shown = run("t@1", "t@2", "--data", "new")
    assert "from t@1 to t@2: " in shown.stdout


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("t", "--min-top1", 0), 0),
        (("t", "--min-top1", 99), GATE_FAILED),
        (("t@1", "--not-worse-than", "t@prod"), 0),
        (("t", "--not-worse-than", "t@prod", "--by", 100), 0),
        (("t", "--max-errors", 0), 0),
    ],
)
def test_the_gate(work: Path, args: tuple[Any, ...], code: int) -> None:
    done = run(*args, "--data", "new", "--json")
    assert done.exit_code == code, done.stderr
    assert json.loads(done.stdout)["gate"]["passed"] == (code == 0)
    assert ("NOT MET" in done.stderr) == (code != 0)


def test_the_gate_judges_every_task_but_the_baseline() -> None:
    of = {name: figures(["a", "b"], np.array([0] * 1000), _of_top1(share)) for name, share in
          {"old": 0.9, "good": 0.895, "bad": 0.88}.items()}  # fmt: skip
    checks = Gate(baseline="old", by=0.5).checks(of, 0)
    assert [check.passed for check in checks] == [True, False]
    assert checks[1].text == "bad: top-1 88.00 %, expected at most 0.5 points below old, which has 90.00 %"
    assert [check.passed for check in Gate(min_top1=90).checks(of, 0)] == [True, False, False]
    assert not Gate(max_errors=2).checks(of, 3)[0].passed


def _of_top1(share: float) -> Any:
    """Answers for 1,000 images of class 0."""
    right = np.arange(1000) < round(1000 * share)
    return np.where(right[:, None], [[0.9, 0.1]], [[0.1, 0.9]]).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["t", "--data", "nowhere"], 1, "nowhere: no such file or folder"),
        (["t", "--data", "empty"], 1, "empty: holds no folders"),
        (["t", "--data", "other"], 1, "classes 'cat', 'dog' not known to task t@2, which has 't-0', 't-1'"),
        (["t", "--data", "near"], 1, "'T-1' is similar to 't-1'"),
        (["t", "--data", "other", "--known-only"], 1, "--known-only leaves no image"),
        (["t", "--data", "new", "--backbone", "vit_none"], 1, "timm has no model of that name"),
        (["zebra", "--data", "new"], 3, "no task 'zebra'"),
        (["t@9", "--data", "new"], 3, "no version 9 of task 't'"),
        (["features", "--data", "new"], 1, "features@1: expected a task with classes"),
        (["damaged.safetensors", "--data", "new"], 4, "damaged.safetensors: "),
        (["missing.safetensors", "--data", "new"], 3, "missing.safetensors: no such file"),
        (["foreign.safetensors", "t", "--data", "new", "--backbone", "pear_tiny"], 1, "was made for backbone vit_huge"),
        (["t", "--data", "new", "--split", "val", "--no-splits", "--train-split", "x"], 1, "no splits"),
        (["t", "--data", "new", "--html", "no/report.html"], 1, "folder no does not exist"),
        (["t", "--data", "new", "--html", "mine.html"], 1, "mine.html: pear-eval did not write this file"),
        (["t", "--data", "new", "--store", "nowhere"], 3, "nowhere: no store there"),
        (["t", "--data", "new", "--device", "gpu"], 1, "device 'gpu' cannot be used"),
        (["t", "--data", "new", "--device", "meta"], 1, "device 'meta' cannot be used"),
        (["t", "--data", ""], 1, "data '': expected a file, a folder or a name"),
        (["t", "--data", "new", "--min-top1", "nan"], 2, "'--min-top1': 'nan' is no number"),
        (["t", "--data", "new", "--not-worse-than", "t@1", "--by", "inf"], 2, "inf is not in the range 0<=x<=100"),
        (["t", "--data", "new", "--html", "new"], 2, "--html new: --data reads this file, so it is not replaced"),
        (["damaged.safetensors", "--data", "new", "--html", "damaged.safetensors"], 2, "TASK reads this file, so"),
        (["t", "--data", "new", "--by", "1"], 2, "--by needs --not-worse-than"),
        (["t"], 2, "Missing option '--data'"),
    ],
)
def test_mistakes_are_one_line(
    work: Path,
    task_maker: Callable[..., Task],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    code: int,
    message: str,
) -> None:
    (work / "empty").mkdir()
    for folder, labels in (("other", ("cat", "dog")), ("near", ("t-0", "T-1"))):
        for label in labels:
            shutil.copytree(work / "new" / "t-0", work / folder / label)
    good = task_maker("x", classes=7)
    write_checkpoint("damaged.safetensors", good)
    (work / "damaged.safetensors").write_bytes((work / "damaged.safetensors").read_bytes()[:-40])
    foreign = {**good.record, "task": "f", "backbone": {"model": "vit_huge", "digest": "sha256:" + "a" * 64}}
    foreign["labels"] = CLASSES
    write_checkpoint("foreign.safetensors", make_task(foreign, good.tensors))
    (work / "mine.html").write_text("<p>my own page</p>")
    done = run(*args)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert (work / "mine.html").read_text() == "<p>my own page</p>"


def test_a_report_that_fails_loses_no_figures(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ValueError("no\nfont")

    monkeypatch.setattr("pear_train.evaluation.report.make_report", fail)
    done = run("t", "--data", "new", "--html", "r.html", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["tasks"]
    assert done.stderr.splitlines()[-1] == "Error: --html r.html: cannot be written: no font"
    done = run("t", "--data", "new", "--html", "r.html", "--max-errors", 0, "--min-top1", 100)
    assert done.exit_code == GATE_FAILED and "gate      NOT MET" in done.stderr


def test_a_broken_image_costs_only_itself_and_is_counted(work: Path) -> None:
    whole = told("t", "--data", "new")
    (work / "new" / "t-3" / "9.png").write_bytes(b"no picture")
    found = told("t", "--data", "new")
    assert found["tasks"][0]["confusion"] == whole["tasks"][0]["confusion"]
    (error,) = found["errors"]
    assert error["image"] == "t-3/9.png" and "not an image" in error["error"]
    shown = run("t", "--data", "new", "--max-errors", 0, "--html", "r.html")
    assert shown.exit_code == GATE_FAILED and "28 images evaluated, 1 could not be read" in shown.stdout
    assert "Not evaluated" in (work / "r.html").read_text()


def test_where_no_image_can_be_read_there_is_one_error(work: Path) -> None:
    for file in (work / "new").rglob("*.png"):
        file.write_bytes(b"no picture")
    done = run("t", "--data", "new")
    assert (
        done.exit_code == 1 and "Error: none of 28 images could be evaluated; the first: new/t-0/0.png" in done.stderr
    )


def test_images_of_other_classes_are_left_out_when_told_so(work: Path) -> None:
    before = told("t", "--data", "new")
    shutil.copytree(work / "new" / "t-0", work / "new" / "zebra")
    found = told("t", "--data", "new", "--known-only")
    assert found["tasks"] == before["tasks"]
    assert found["notes"] == ["4 images of classes that are not the task's: 'zebra'"]


def test_which_split_is_evaluated(work: Path, task_maker: Callable[..., Task]) -> None:
    task = task_maker("t", classes=7)
    whole = open_labelled("new")
    assert len(choose(whole, None, [task]).images) == 28
    assert len(choose(whole, "test", [task]).images) == len(open_labelled("new").dataset().splits["test"]) == 7
    trained = make_task({**task.record, "training": {"data_fingerprint": whole.dataset().fingerprint}}, task.tensors)
    held = choose(whole, None, [trained])
    assert held.split == "test" and "t was trained with this data" in held.notes[0]
    assert "the figures say nothing about new ones" in choose(whole, "all", [trained]).notes[0]
    for split in ("train", "test"):
        shutil.copytree("new", Path("splits", split))
    (work / "splits" / "test" / "t-0" / "0.png").unlink()
    splits = open_labelled("splits")
    assert (choose(splits, None, [task]).split, len(choose(splits, None, [task]).images)) == ("test", 27)
    assert len(choose(splits, "all", [task]).images) == 55
    shutil.rmtree("splits/train")
    assert choose(open_labelled("splits", needs_train=False), None, [task]).split == "test"


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "a&b",
    "</style><b>",
    "'x'",
    "z",
]


class Page(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_a_report_shows_hostile_names_as_text_and_asks_no_host(work: Path, task_maker: Callable[..., Task]) -> None:
    task = task_maker("t", seed=1, classes=7)
    write_checkpoint("hostile.safetensors", make_task({**task.record, "labels": HOSTILE}, task.tensors))
    again = make_task(
        {**task_maker("t", seed=5, classes=7).record, "labels": HOSTILE}, task_maker("t", seed=5, classes=7).tensors
    )
    write_checkpoint("again.safetensors", again)
    rng = np.random.default_rng(0)
    images, targets = rng.integers(0, 255, (42, 150, 120, 3), dtype=np.uint8), np.arange(42) % 7
    np.savez("d.npz", x_test=images, y_test=targets, classes=np.array(HOSTILE))
    done = run("hostile.safetensors", "again.safetensors", "--data", "d.npz", "--html", "r.html", "--min-top1", 100)
    assert done.exit_code == GATE_FAILED, done.stderr
    text = (work / "r.html").read_text()
    page = Page()
    page.feed(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert str(value).startswith(("data:image/", "#")), value
    assert not re.search(r"(?:https?:)?//[a-z]|url\(|@import", re.sub(r"data:image/[a-z]+;base64,[^\"]+", "", text))
    for label in HOSTILE:
        assert label in page.text
    assert "49" not in re.findall(r"taken for (\S+)", page.text)
    assert sum(tag == "img" for tag, _ in page.tags) > 5
    assert text.startswith("<!doctype html>") and "default-src 'none'" in text
    done = run("hostile.safetensors", "--data", "d.npz", "--html", "r.html")  # its own report is replaced
    assert done.exit_code == 0 and "\x1b" not in done.output


def test_a_report_of_many_classes_is_a_picture(task_maker: Callable[..., Task], backbone: Backbone) -> None:
    task = task_maker("many", classes=70)
    router = Router(backbone)
    router.add(task)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (140, 16, 16, 3), dtype=np.uint8)
    split = Split(lambda i: images[i], torch.arange(140) % 70)
    sample = choose(Labelled("d", task.labels, {"test": split}), None, [task])
    found = evaluate(router, [Subject("many", "many", task)], sample)
    text = make_report(found, 4, Limits(10_000))
    assert 'alt="Confusion matrix of 70 classes' in text
