"""The page at `/`, in a real Chromium."""

import base64
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from axe_playwright_python import sync_playwright as axe_of
from PIL import Image
from playwright import sync_api as playwright

from pear_store import Store, Task, make_task
from router import Backbone, Router
from router.serve.app import create_app
from router.serve.batcher import Batcher
from router.serve.metrics import Metrics
from tests.router.serve.conftest import PICTURES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
expect = playwright.expect
expect.set_options(timeout=30_000)
pytestmark = pytest.mark.slow
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")

FILE = {"name": "picture.png", "mimeType": "image/png", "buffer": PICTURES[0]}
HOSTILE = ['<img src=x onerror="window.hit=1">', "</li><script>window.hit=1</script>", "a & b &amp; <b>c</b>"]
TOKEN = "a-token-to-use-tasks"
TOUCH = "--blink-settings=primaryPointerType=2,availablePointerTypes=2"
"""A screen that is touched, as of a phone: Chromium without a screen has a mouse otherwise."""
SCREENS = [
    (360, 740, "dark"),
    (1280, 860, "light"),
    (360, 740, "light"),
    (1280, 860, "dark"),
]


@contextmanager
def serving(router: Router, **options: Any) -> Iterator[str]:
    """A server in a thread; gives its address."""
    metrics = Metrics()
    batcher = Batcher(router, watch=metrics)
    routes = [metrics.route(router, batcher)]
    app = create_app(router, batcher=batcher, counted=metrics.counted, more_routes=routes, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        try:
            with httpx.Client(trust_env=False) as client:
                for _ in range(600):
                    if server.started and client.get(address + "readyz").status_code == 200:
                        break
                    threading.Event().wait(0.05)
            yield address
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, task_maker: Callable[..., Task]) -> Path:
    """a to e with labels, features without; `hostile`, whose labels want to be HTML; a, hostile and twin are
    the same tensors."""
    where = tmp_path_factory.mktemp("page") / "s"
    with Store.create(where) as store:
        for seed, name in enumerate("abcde"):
            store.add(task_maker(name, seed=seed, classes=3 + seed))
        store.add(task_maker("features", seed=9, headless=True))
        for name, labels in (("hostile", HOSTILE), ("twin", ["one", "two", "three"])):
            made = task_maker(name, seed=0, classes=3)
            store.add(make_task({**made.record, "labels": labels}, made.tensors))
        store.tag("b", "prod")
    return where


@pytest.fixture(scope="module")
def router(backbone: Backbone, tasks: Path) -> Iterator[Router]:
    with Router(backbone, tasks) as made:
        yield made


@pytest.fixture(scope="module")
def address(router: Router) -> Iterator[str]:
    with serving(router) as found:
        yield found


@pytest.fixture(scope="module")
def browsers() -> Iterator[Callable[[bool], Any]]:
    """One Chromium with a mouse, and one that is touched."""
    with playwright.sync_playwright() as driver:
        opened: dict[bool, Any] = {}

        def browser(is_touched: bool) -> Any:
            if is_touched not in opened:
                args = [TOUCH] if is_touched else []
                opened[is_touched] = driver.chromium.launch(executable_path=CHROMIUM, args=args)
            return opened[is_touched]

        yield browser
        for one in opened.values():
            one.close()


@pytest.fixture
def visit(browsers: Callable[[bool], Any]) -> Iterator[Callable[..., Any]]:
    """Opens the page. At the end: it asked no other host, and nothing went wrong that nobody expected."""
    contexts: list[Any] = []
    asked: list[str] = []
    wrong: list[str] = []

    def open_page(address: str, width: int = 1280, height: int = 860, scheme: str = "light") -> Any:
        context = browsers(width < 500).new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 500
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Failed to load resource" not in line.text else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    assert {re.sub(r"^(blob:)?http://127\.0\.0\.1:\d+/.*$", "ours", url) for url in asked} == {"ours"}
    assert not wrong


def choose(page: Any, *names: str) -> None:
    """Of some ten tasks."""
    if page.locator("#none").is_visible():
        page.click("#none")
    for name in names:
        page.check(f"#rows input[value='{name}']")


def show(page: Any, file: Any = FILE) -> None:
    page.set_input_files("#file", file)


def answered(page: Any, count: int) -> Any:
    """The answers, once all are there."""
    noun = "answer" if count == 1 else "answers"
    expect(page.locator("#summary")).to_contain_text(re.compile(rf"^{count}\s{noun} in "))
    found = page.locator("#found > li")
    expect(found).to_have_count(count)
    return found


def percent(share: float) -> str:
    text = "100" if share == 1 else f"{100 * share:.1f}"
    return "> 99.9 %" if 0.999 < share < 1 else "< 0.1 %" if share < 0.001 else f"{text} %"


def plain(text: str) -> str:
    return text.replace("\xa0", " ")


@in_chromium
def test_one_several_and_all_tasks_are_asked(address: str, visit: Callable[..., Any], router: Router) -> None:
    page = visit(address)
    expect(page.locator("#chosen")).to_have_text("8 chosen")  # so few are chosen from the start
    choose(page, "a")
    expect(page.locator("#ask")).to_have_text("Choose a picture first")
    show(page)
    said = router.run(PICTURES[0], "a")[0]
    (answer,) = answered(page, 1).all()
    assert answer.locator(".task").inner_text() == "a v1"
    labels = [one.inner_text() for one in answer.locator(".label").all()]
    assert labels == [label for label, _ in said.topk(5)]
    shares = [plain(one.inner_text()) for one in answer.locator(".share").all()]
    assert shares == [percent(share) for _, share in said.topk(5)]
    whole, filled = (answer.locator(name).first.bounding_box()["width"] for name in (".bar", ".filled"))
    assert filled / whole == pytest.approx(said.topk(1)[0][1], abs=0.01)
    assert "One batch of 1 row and 1 task" in plain(page.inner_text("#summary"))
    expect(page.locator("#about")).to_contain_text("picture.png · 50 × 40")
    # several
    choose(page, "b", "features")
    page.click("#ask")
    answers = answered(page, 2)
    assert answers.nth(0).locator(".label").first.inner_text() == router.run(PICTURES[0], "b")[0].label
    assert plain(answers.nth(1).inner_text()).endswith("features, 192 numbers")
    assert "One batch of 2 rows and 2 tasks" in plain(page.inner_text("#summary"))
    # all
    page.click("#all")
    page.click("#ask")
    answers = answered(page, 8)
    assert [one.inner_text().split()[0] for one in answers.all()] == [*"abcde", "features", "hostile", "twin"]
    answers.nth(1).locator("summary").click()
    expect(answers.nth(1).locator("details .note")).to_contain_text("on the device")


@in_chromium
def test_an_unknown_is_shown_as_one_with_what_is_likeliest(judging: Router, visit: Callable[..., Any]) -> None:
    with serving(judging) as address:
        page = visit(address)
        choose(page, "mild", "strict")
        show(page)
        mild, strict = answered(page, 2).all()
        best = judging.run(PICTURES[0], "strict")[0]
        assert mild.locator("summary .label").inner_text() == judging.run(PICTURES[0], "mild")[0].label
        assert mild.locator("details .note").count() == 0
        assert strict.locator("summary .label").inner_text() == "unknown"
        assert strict.locator("summary .share").inner_text() == ""
        assert [one.inner_text() for one in strict.locator("li .label").all()] == [name for name, _ in best.topk(3)]
        note = plain(strict.locator("details .note").inner_text())
        assert note == f"Unknown: its likeliest label has less than {percent(best.threshold or 0)}, which is asked for."


@in_chromium
def test_a_picture_is_dropped_or_pasted(address: str, visit: Callable[..., Any], router: Router) -> None:
    page = visit(address)
    choose(page, "c")
    made = """([bytes, name]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type: "image/png" }));
        return data;
    }"""
    for number, way in enumerate(("drop", "paste"), 1):
        data = page.evaluate_handle(made, [base64.b64encode(PICTURES[number]).decode(), f"{way}.png"])
        if way == "drop":
            page.dispatch_event("#drop", "dragover", {"dataTransfer": data})
            expect(page.locator("body")).to_have_class(re.compile("dragging"))
            page.dispatch_event("#drop", "drop", {"dataTransfer": data})
            expect(page.locator("body")).not_to_have_class(re.compile("dragging"))
        else:
            page.evaluate(
                "(data) => document.body.dispatchEvent(new ClipboardEvent('paste', "
                "{ clipboardData: data, bubbles: true, cancelable: true }))",
                data,
            )
        expect(page.locator("#about")).to_contain_text(f"{way}.png")
        said = router.run(PICTURES[number], "c")[0]
        answer = answered(page, 1)
        expect(answer.locator(".label").first).to_have_text(said.label)
        expect(answer.locator(".share").first).to_have_text(percent(said.topk(1)[0][1]))
    empty = page.evaluate_handle("() => new DataTransfer()")
    page.dispatch_event("#drop", "drop", {"dataTransfer": empty})
    expect(page.locator("#problem")).to_have_text("That is no file: drop a picture from a folder.")


@in_chromium
def test_the_list_says_what_is_known_of_tasks(address: str, visit: Callable[..., Any]) -> None:
    page = visit(address)
    expect(page.locator("#server")).to_have_text("pear_tiny · cpu · ready")
    expect(page.locator("#rows tr")).to_have_count(8)
    rows = {
        plain(row.inner_text()).split("\n")[0].strip(): plain(row.inner_text())
        for row in page.locator("#rows tr").all()
    }
    assert list(rows) == [*"abcde", "features", "hostile", "twin"]
    for name, about, share in (("a", "v1 · 3 labels", 1.0), ("b", "v1 · prod · 4 labels", 0.0)):
        assert about in rows[name]
        assert "50.0 %" in rows[name]
        assert "validation" in rows[name]
        assert f"{round(100 * share)} %" in rows[name].split("validation")[1]
    assert "features" in rows["features"].split("\n", 1)[1]


@in_chromium
def test_names_and_labels_stay_text(address: str, visit: Callable[..., Any]) -> None:
    page = visit(address)
    choose(page, "hostile")
    show(page, {**FILE, "name": HOSTILE[0] + ".png"})
    answers = answered(page, 1)
    labels = [one.inner_text() for one in answers.locator(".label").all()]
    assert sorted(labels) == sorted(HOSTILE)
    expect(page.locator("#about")).to_contain_text(HOSTILE[0] + ".png")

    def lie(route: Any) -> None:
        """A store has no such names; a server that lies may."""
        found = route.fetch().json()
        for task in found["tasks"]:
            task["name"], task["tags"] = HOSTILE[1] + task["name"], [HOSTILE[2]]
            task["metrics"] = {HOSTILE[0]: 0.5}
        route.fulfill(json=found)

    page.route("**/v1/tasks?*", lie)
    page.fill("#search", "a")
    row = page.locator("#rows tr").first
    expect(row.locator(".name")).to_have_text(HOSTILE[1] + "a")
    expect(row).to_contain_text(HOSTILE[0])
    expect(row).to_contain_text(HOSTILE[2])
    page.click("#none")
    row.locator("input").check()
    expect(page.locator("#ask")).to_have_text("Ask " + HOSTILE[1] + "a")
    page.click("#ask")
    expect(page.locator("#problem, #found .reason").filter(visible=True)).to_contain_text("script")
    assert page.locator("main img").count() == 1
    assert page.locator("script").count() == 1
    assert page.evaluate("window.hit") is None


@in_chromium
def test_the_token_is_asked_for_and_kept_for_the_tab_only(router: Router, visit: Callable[..., Any]) -> None:
    with serving(router, use_token=TOKEN) as address:
        page = visit(address)
        door = page.locator("#door")
        expect(door).to_be_visible()
        page.keyboard.press("Escape")
        expect(door).to_be_visible()
        page.fill("#token", "not-this-one")
        page.keyboard.press("Enter")
        expect(page.locator("#door-note")).to_have_text("This token is not known. Try another one.")
        page.fill("#token", TOKEN)
        page.click("#door button")
        expect(door).to_be_hidden()
        expect(page.locator("#rows tr")).to_have_count(8)
        choose(page, "a")
        show(page)
        answered(page, 1)
        assert page.evaluate("[JSON.stringify(sessionStorage), localStorage.length, document.cookie]") == [
            f'{{"pear-token":"{TOKEN}"}}', 0, "",
        ]  # fmt: skip
        assert TOKEN not in page.content()
        page.reload()
        expect(page.locator("#rows tr")).to_have_count(8)
        assert not door.is_visible()
        page.click("#forget")
        expect(door).to_be_visible()
        expect(visit(address).locator("#door")).to_be_visible()


@in_chromium
def test_what_goes_wrong_is_one_clear_line(address: str, visit: Callable[..., Any]) -> None:
    page = visit(address)
    choose(page, "a")
    problem = page.locator("#problem")
    assert problem.get_attribute("role") == "alert"
    show(page, {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(problem).to_be_visible()
    text = httpx.post(address + "v1/tasks/a/predict", content=b"no picture", trust_env=False).json()["detail"]
    assert problem.inner_text().lower().rstrip(".") == text.lower().rstrip(".")
    show(page)
    answered(page, 1)
    assert not problem.is_visible()
    # of several, each has its own
    choose(page, "a", "b")
    show(page, {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator("#found .reason")).to_have_count(2)
    expect(page.locator("#summary")).to_contain_text("0 answers")
    page.route("**/v1/predict?*", lambda route: route.abort())
    page.click("#ask")
    expect(problem).to_have_text("The server cannot be reached.")
    near = {"status": 404, "title": "x", "detail": "no task 'flowrs'", "near": ["flowers"]}
    page.unroute("**/v1/predict?*")
    page.route("**/v1/predict?*", lambda route: route.fulfill(status=404, json=near))
    page.click("#ask")
    expect(problem).to_have_text("No task 'flowrs'. Did you mean flowers?")


@in_chromium
@pytest.mark.parametrize(("width", "height", "scheme"), SCREENS)
def test_it_fits_and_can_be_read(
    address: str, visit: Callable[..., Any], tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    """On a phone and a desk, in the light and the dark: nothing is cut off, and axe-core finds nothing serious."""
    page = visit(address, width, height, scheme)
    axe = axe_of.Axe()

    def check(state: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, state
        violations = axe.run(page).response["violations"]
        serious = [one for one in violations if one["impact"] in ("serious", "critical")]
        assert not serious, [(one["id"], [node["html"] for node in one["nodes"]]) for one in serious]

    expect(page.locator("#rows tr")).to_have_count(8)
    check("empty")
    show(page, {**FILE, "name": "a-very-long-name-without-any-place-to-break-it-" * 4 + ".png"})
    answered(page, 8)
    page.locator("summary").nth(1).click()
    check("answered")
    choose(page, "a")
    page.set_input_files("#file", {"name": "x", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page.locator("#problem")).to_be_visible()
    check("failed")
    assert page.locator("text=Take a photo").is_visible() == (width < 500)
    ground = Image.open(BytesIO(page.screenshot())).convert("L").getpixel((2, 2))
    assert isinstance(ground, int | float)
    assert (ground > 128) == (scheme == "light")


@in_chromium
def test_the_door_can_be_read(router: Router, visit: Callable[..., Any]) -> None:
    with serving(router, use_token=TOKEN) as address:
        page = visit(address, 360, 740)
        expect(page.locator("#door")).to_be_visible()
        assert not [one for one in axe_of.Axe().run(page).response["violations"] if one["impact"] != "minor"]


@in_chromium
def test_the_keyboard_suffices(address: str, visit: Callable[..., Any]) -> None:
    page = visit(address)
    expect(page.locator("#rows tr")).to_have_count(8)
    where = """() => {
        const at = document.activeElement;
        const drawn = at.closest(".button") ?? at;
        return [at.id || at.value || at.className, getComputedStyle(drawn).outlineStyle];
    }"""

    def walk(until: str) -> list[str]:
        seen: list[str] = []
        for _ in range(40):
            page.keyboard.press("Tab")
            name, outline = page.evaluate(where)
            assert outline != "none", f"{name}: its focus cannot be seen"
            seen.append(name)
            if name == until:
                return seen
        raise AssertionError(f"{until} is not reached: {seen}")

    assert walk("none") == ["skip", "file", "search", "all", "none"]
    page.keyboard.press("Enter")
    expect(page.locator("#chosen")).to_have_text("none chosen")
    show(page)  # a dialog of the system, which a test does not open
    page.focus("#search")
    page.keyboard.type("twin")
    expect(page.locator("#rows tr")).to_have_count(1)
    walk("twin")
    page.keyboard.press("Space")
    expect(page.locator("#chosen")).to_have_text("1 chosen")
    assert walk("ask") == ["ask"]
    page.keyboard.press("Enter")
    answered(page, 1)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    expect(page.locator("#found details")).not_to_have_attribute("open", "")


@in_chromium
def test_load_is_drawn_from_the_metrics(address: str, visit: Callable[..., Any]) -> None:
    page = visit("about:blank")
    page.clock.install()
    with page.expect_response("**/metrics"):
        page.goto(address)
    expect(page.locator("#rows tr")).to_have_count(8)
    number = page.locator("#figures dd:first-of-type")
    with page.expect_response("**/metrics"):
        page.clock.pause_at(page.evaluate("Date.now()") + 60_000)  # from here on the page's time stands still
    expect(number.first).to_have_text("0")
    show(page)
    answered(page, 8)
    with page.expect_response("**/metrics"):
        page.clock.run_for(2100)
    expect(number.first).to_have_text(re.compile(r"^0\.[2-9]$"))
    texts = [plain(one.inner_text()) for one in number.all()]
    assert texts[1:3] == ["8.0", "8.0"]
    assert texts[4] == "0"
    assert re.fullmatch(r"\d+ %", texts[3])
    for curve in page.locator("#figures path.curve").all():
        assert curve.get_attribute("d").startswith("M")


@in_chromium
def test_five_thousand_tasks_are_searched_and_asked(
    backbone: Backbone, tmp_path: Path, visit: Callable[..., Any], task_maker: Callable[..., Task]
) -> None:
    one = task_maker("t", classes=2)
    with Store.create(tmp_path / "s") as store:
        made = (make_task({**one.record, "task": f"task-{i:04d}"}, one.tensors) for i in range(5000))
        assert len(list(store.add_many(made))) == 5000
        with Router(backbone, store) as many, serving(many) as address:
            page = visit(address)
            expect(page.locator("#range")).to_have_text("1–10 of 5,000")
            expect(page.locator("#chosen")).to_have_text("none chosen")
            page.click("#after")
            expect(page.locator("#range")).to_have_text("11–20 of 5,000")
            expect(page.locator("#rows .name").first).to_have_text("task-0010")
            page.click("#before")
            expect(page.locator("#range")).to_have_text("1–10 of 5,000")
            page.fill("#search", "K-42")
            expect(page.locator("#range")).to_have_text("1–10 of 100")
            expect(page.locator("#rows .name").first).to_have_text("task-4200")
            page.click("#all")
            expect(page.locator("#chosen")).to_have_text("100 chosen")
            page.fill("#search", "")
            expect(page.locator("#range")).to_have_text("1–10 of 5,000")
            page.click("#all")
            expect(page.locator("#chosen")).to_have_text("5,000 chosen")
            assert page.locator("#rows tr").count() == 10  # never thousands of elements
            show(page)
            expect(page.locator("#summary")).to_contain_text("of 5,000 tasks answered")
            expect(page.locator("#found > li")).to_have_count(24)
            expect(page.locator("#ask")).to_have_text("Stop")
            page.click("#ask")
            expect(page.locator("#summary")).to_contain_text("Stopped after")
            expect(page.locator("#found > li")).to_have_count(24)
            page.fill("#search", "zebra")
            expect(page.locator("#range")).to_have_text("none has this in its name")


def test_the_wheel_holds_all_pages(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    for name in ("pear_store", "router", "pear_train"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    (made,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(made) as wheel:
        held = {name for name in wheel.namelist() if "/page/" in name}
    files = [file for name in ("pear_store", "router", "pear_train") for file in (root / name).rglob("page/*.*")]
    assert held == {str(file.relative_to(root)) for file in files}
    assert len(held) > 12
