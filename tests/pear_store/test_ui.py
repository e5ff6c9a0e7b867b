"""The page that shows a store: what it answers, whom it answers, and how it looks in a real Chromium."""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python import sync_playwright as axe_of
from playwright import sync_api as playwright
from starlette.testclient import TestClient

from pear_store import Store, Task, make_task
from pear_store.ui.app import HEADERS, create_app
from pear_store.ui.overview import MOST_MAPPED, Overview
from tests.helpers.makers import floats, record, sharing_tasks, small_task, tensors
from tests.pear_store.test_cli import run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
expect = playwright.expect
expect.set_options(timeout=30_000)
HOSTILE = '<img src=x onerror="window.hit=1">'


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tasks on three backbones, one of them in two versions and tagged, and one that wants to be HTML."""
    path = tmp_path_factory.mktemp("ui") / "s"
    with Store.create(path) as store:
        for task in sharing_tasks(12):
            store.add(task)
        store.tag("task-003", "prod")
        evil = record(
            "evil", backbone={"model": HOSTILE, "digest": "sha256:" + "f" * 64}, metrics={HOSTILE: 1, "val_top1": 0.5},
            training={"method": HOSTILE, "data": HOSTILE}, labels=[HOSTILE, "b"],
        )  # fmt: skip
        store.add(Task(evil, tensors(3)))
        made = store.get("task-003")
        store.add(make_task({**made.record, "metrics": {"val_top1": 0.99}}, made.tensors))
    return path


@pytest.fixture
def client(where: Path) -> Iterator[TestClient]:
    with Store(where) as store, TestClient(create_app(store), base_url="http://127.0.0.1:8091") as made:
        yield made


def test_the_store_in_numbers(client: TestClient, where: Path) -> None:
    found = client.get("/v1/store").json()
    with Store(where) as store:
        stats = store.stats()
    assert (found["tasks"], found["versions"]) == (13, 14)
    assert (found["logical_bytes"], found["unique_bytes"]) == (stats.logical_bytes, stats.unique_bytes)
    assert [backbone["tasks"] for backbone in found["backbones"]] == [8, 3, 1, 1]
    assert found["growth"][-1]["unique_bytes"] == stats.unique_bytes and found["problem"] is None
    vit = found["backbones"][0]
    assert vit["unique_bytes"] < vit["logical_bytes"]


def names(client: TestClient, **values: object) -> list[str]:
    found = client.get("/v1/tasks", params={key: str(value) for key, value in values.items()}).json()
    return [row["task"] for row in found["tasks"]]


def test_the_list_is_searched_sorted_and_cut(client: TestClient) -> None:
    assert names(client, search="TASK-01") == ["task-010", "task-011"]
    assert names(client, search="E", count=2) == ["evil"]
    assert names(client, first=3, count=2) == ["task-002", "task-003"]
    assert names(client, sort="accuracy", reverse="true", count=1) == ["task-003"]
    assert names(client, backbone="sha256:" + "f" * 64) == ["evil"]
    assert names(client, search="a[b") == names(client, search="*") == names(client, search="é") == []
    page = client.get("/v1/tasks", params={"search": "task", "count": 5}).json()
    assert (page["matching"], page["total"], len(page["tasks"])) == (12, 13, 5)
    row = next(row for row in page["tasks"] if row["task"] == "task-003")
    assert row["older_tags"] == {"prod": 1} and row["new_bytes"] == 0
    shared = page["tasks"][0]["shared_bytes"]
    assert 0 < shared < page["tasks"][0]["bytes"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("sort=colour", "sort='colour': expected one of name, backbone"),
        ("first=-1", "first='-1': expected a whole number"),
        ("count=201", "count='201': expected a whole number up to 200"),
        ("count=x", "count='x'"),
    ],
)
def test_a_question_that_is_no_good_is_one_line(client: TestClient, query: str, message: str) -> None:
    answer = client.get(f"/v1/tasks?{query}")
    assert answer.status_code == 422 and message in answer.json()["detail"]


def test_one_task(client: TestClient) -> None:
    task = client.get("/v1/tasks/task-003").json()
    assert [(row["version"], row.get("tags", [])) for row in task["versions"]] == [(2, []), (1, ["prod"])]
    assert task["origin"]["options"] == {"method": "pear", "ratio": 0.5, "seed": 0}
    assert task["sharing"]["count"] == 0  # its own older version is no other task
    assert client.get("/v1/tasks/task-001").json()["sharing"]["count"] > 1
    gone = client.get("/v1/tasks/nope")
    assert gone.status_code == 404 and "no task 'nope'" in gone.json()["detail"]
    assert client.get("/v1/tasks/..%2f..%2fetc").status_code == 404
    assert client.get("/page/..%2fapp.py").status_code == 404
    assert client.get("/page/app.py").status_code == 404


def test_the_map_says_what_tasks_share(client: TestClient, where: Path) -> None:
    found = client.get("/v1/map").json()
    places = {one["task"]: place for place, one in enumerate(found["tasks"])}
    with Store(where) as store:
        sizes = {
            name: {t.digest: t.size_bytes for t in store.get(name, copy=False).tensors.values()} for name in places
        }
    assert len(places) == 8
    for a in places:
        for b in places:
            said = sum(group["size_bytes"] for group in found["groups"] if {places[a], places[b]} <= {*group["tasks"]})
            if a != b:
                assert said == sum(sizes[a][digest] for digest in sizes[a].keys() & sizes[b])
    assert client.get("/v1/map?backbone=unknown").json() == {"tasks": [], "groups": [], "left_out": 0}


def test_a_map_of_many_tasks_draws_those_that_share_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pear_store.ui.overview.MOST_MAPPED", 4)
    with Store.create(tmp_path) as store:
        for task in sharing_tasks(12):
            store.add(task)
        found = Overview(store).map(None)
        assert MOST_MAPPED > 4 == len(found["tasks"]) and found["left_out"] == 4
        first = found["groups"][0]
        assert first["of_tasks"] > 3 and first["tasks"] == [0, 1, 2, 3]


def test_what_is_added_meanwhile_is_shown(tmp_path: Path) -> None:
    with Store.create(tmp_path) as store, TestClient(create_app(store), base_url="http://localhost") as client:
        assert client.get("/v1/store").json()["tasks"] == 0
        assert client.get("/v1/tasks").json()["tasks"] == client.get("/v1/map").json()["tasks"] == []
        store.add(small_task("new"))
        assert client.get("/v1/store").json()["tasks"] == 1
        store.add(small_task("new", head__bias=floats([1.0, 2.0])))
        assert client.get("/v1/tasks").json()["tasks"][0]["version"] == 2


def test_only_this_machines_names_are_answered(client: TestClient) -> None:
    """A page elsewhere may have its own name lead to 127.0.0.1: the browser then says that name."""
    for host, status in (
        ("127.0.0.1:8091", 200), ("localhost", 200), ("evil.example", 400), ("evil.example:8091", 400),
        ("127.0.0.1.evil.example", 400), ("", 400),
    ):  # fmt: skip
        for path in ("/", "/v1/store", "/page/page.js"):
            assert client.get(path, headers={"Host": host}).status_code == status, (host, path)


def test_every_answer_tells_browsers_to_trust_nothing_else(client: TestClient) -> None:
    paths = ["/", "/page/style.css", "/v1/store", "/v1/tasks/nope", "/nowhere", "/v1/tasks?sort=x"]
    answers = [*map(client.get, paths), client.get("/", headers={"Host": "evil"})]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS, answer.url
        assert "access-control-allow-origin" not in answer.headers
    policy = HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy and "http" not in policy
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in ("/", "/v1/store", "/v1/tasks/task-001"):
            assert client.request(method, path).status_code == 405
    page = client.get("/").text
    assert not re.search(r"(src|href)=\"(https?:)?//", page) and "<style" not in page and " style=" not in page


@contextmanager
def serving(where: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The command, on a free port."""
    code = "from pear_store.cli import main; main()"
    command = [sys.executable, "-c", code, "--store", str(where), "ui", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"shows {where}; Ctrl-C ends it" in line, process.communicate()
        yield line.split()[0], process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_command_without_a_word(where: Path, number: signal.Signals) -> None:
    with serving(where) as (address, process):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{address}v1/store", timeout=60) as answer:
            assert json.load(answer)["tasks"] == 13
        busy = run("--store", where, "ui", "--port", address.rstrip("/").rpartition(":")[2])
        assert busy.exit_code == 1 and "cannot listen there: Address already in use" in busy.stderr
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0


def test_without_the_extra_one_line_says_what_is_missing(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pear_store.ui.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = run("--store", where, "ui")
    assert done.exit_code == 1 and "pip install 'pear-adapters[serve]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_store_is_said_before_anything_listens(tmp_path: Path) -> None:
    done = run("--store", tmp_path / "nowhere", "ui", "--port", "0")
    assert done.exit_code == 3 and "no store there" in done.stderr


# ---- in a browser


@pytest.fixture(scope="module")
def address(where: Path) -> Iterator[str]:
    with serving(where) as (found, _):
        yield found


@pytest.fixture
def visit(address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page. At the end: it asked no other host, and nothing went wrong that nobody expected."""
    asked: list[str] = []
    wrong: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)

        def open_page(width: int = 1400, scheme: Any = "light") -> Any:
            page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
            page.set_default_timeout(30_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda line: wrong.append(line.text))
            page.goto(address)
            expect(page.locator("#groups li").first).to_be_visible()
            return page

        yield open_page
        browser.close()
    assert asked and all(url.startswith(address) for url in asked)
    assert not wrong


@pytest.mark.slow
@in_chromium
def test_the_page_shows_tasks_sharing_and_growth(visit: Callable[..., Any]) -> None:
    page = visit()
    rows = page.locator("#rows tr")
    expect(rows).to_have_count(13)
    expect(page.locator("#figures dd").first).to_have_text("13")
    expect(page.locator("#backbones li")).to_have_count(4)
    expect(page.locator("#growth polygon")).to_have_count(2)
    expect(rows.filter(has_text="task-003")).to_contain_text("prod@1")
    page.fill("#search", "task-01")
    expect(rows).to_have_count(2)
    page.fill("#search", "")
    page.click("#headings button:has-text('Accuracy')")
    expect(rows.first).to_contain_text("task-003")
    expect(page.locator("[aria-sort]")).to_have_attribute("aria-sort", "descending")
    page.select_option("#backbone", index=2)
    expect(rows).to_have_count(3)
    expect(page.locator("#map-note")).to_contain_text("3 tasks of deit_tiny")
    page.select_option("#backbone", index=0)
    expect(page.locator("#map-note")).to_contain_text("8 tasks of vit_base")
    page.hover("#map", position={"x": 100, "y": 20})
    expect(page.locator("#map-cell")).to_contain_text(re.compile("share|: "))
    page.click("#rows button:has-text('task-003')")
    details = page.locator("#details")
    expect(details).to_contain_text("2 versions")
    expect(details).to_contain_text("method")
    page.keyboard.press("Escape")
    expect(details).to_be_hidden()


@pytest.mark.slow
@in_chromium
def test_what_a_store_holds_stays_text(visit: Callable[..., Any]) -> None:
    page = visit()
    row = page.locator("#rows tr").filter(has_text="evil")
    expect(row).to_contain_text(HOSTILE)
    expect(page.locator("#backbones")).to_contain_text(HOSTILE)
    row.locator("button").click()
    expect(page.locator("#details dd").filter(has_text=HOSTILE)).to_have_count(4)
    assert page.locator("img").count() == 1 and page.locator("script").count() == 1
    assert page.evaluate("window.hit") is None


@pytest.mark.slow
@in_chromium
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light"), (400, "light"), (1400, "dark")])
def test_the_page_fits_and_can_be_read(visit: Callable[..., Any], width: int, scheme: str) -> None:
    page = visit(width, scheme)

    def check(state: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state
        violations = axe_of.Axe().run(page).response["violations"]
        serious = [one for one in violations if one["impact"] in ("serious", "critical")]
        assert not serious, [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious]

    check("list")
    page.click("#rows button:has-text('task-001')")
    expect(page.locator("#details")).to_be_visible()
    check("details")
