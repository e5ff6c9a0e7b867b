"""Every command and program of the guides is run, on small data, or is listed here with the reason why not."""

import re
import shutil
import socket
import textwrap
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import pear_store.cli
import pear_train.cli
from tests.helpers.pages import run_steps
from tools.demo import Labelled, digits, write_folder

ROOT = Path(__file__).parents[1]
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:pear-(?:store|train|eval|infer|serve)|pip|make|curl|head|docker)\b(?! \()")
"""How an indented line begins that is a command"""
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n)+", re.MULTILINE)

pytestmark = pytest.mark.slow


@dataclass
class Page:
    """What a page's commands become where they are run, and which are not run."""

    substitutes: dict[str, str]
    """Text of a command -> what is run in its place, in this order"""
    unrun: dict[str, str]
    """How a command begins -> why it is not run"""
    drawings: tuple[str, ...] = ()
    """How indented blocks begin that are not what a command prints"""


def served(command: str, path: str) -> str:
    """Starts a server, and asks it for a page once it is ready."""
    ask = f"curl -sSf -o served --retry 60 --retry-connrefused --retry-delay 1 localhost:$PORT{path}"
    return f"{command} --port $PORT > served.log 2>&1 & {ask}"


STOP = "; code=$?; kill $!; wait $!; test $code = 0"
INSTALLS = "installs packages"
EXAMPLES = "tests/router/serve/test_examples.py runs it"
CLUSTER = "needs a Ray cluster: tests/cluster runs such"
PAGES = {
    "README.md": Page(
        {
            "NAME --data DATA --backbone MODEL --out FILE": "new --data digits --out new.safetensors --epochs 2",
            "MODEL --out checkpoints/": "pear_tiny --out checkpoints/",
            "my/new/images": "digits",
            "pear-store init": "pear-store init --store other.store",
            "[PATTERN]": "'d*'",
            "rm TASK@1": "rm TASK@1 --yes",
            "TASK@2 FILE": "TASK@2 exported.safetensors",
            "export-onnx TASK FILE": "export-onnx TASK task.onnx",
            "TASK FILE": "TASK timm.safetensors",
            "peft TASK DIR": "peft TASK peft",
            "hub TASK DIR": "hub TASK hub",
            "TASK": "dtd",
            "--older-than 90d": "--older-than 90d --yes",
            "COPIES": "copies",
            "DIR --name NAME --backbone MODEL --labels FILE": "lora --name lora --backbone pear_tiny --labels lora.txt",
            "FILE.png": "sharing.png",
            "pear-store ui": served("pear-store ui", "/") + STOP,
            "init team s3://bucket/pear": "init team team",
            "s3://bucket/pear": "file://$PWD/team",
            "vit_base_patch16_224.augreg_in21k": "pear_tiny",
            "from router import Router\n": "import numpy as np\nfrom PIL import Image\nfrom router import Router\n"
            "picture = Image.open('a.jpg')\narray, images, tasks = np.asarray(picture), ['a.jpg'], ['dtd']\n",
            "pear-serve --store pear.store --backbone MODEL": served("pear-serve --backbone pear_tiny", "/readyz"),
            "localhost:8090": "localhost:$PORT",
        },
        {"pip install": INSTALLS, "make ": "makes an environment, and takes minutes"},
    ),
    "docs/store.md": Page(
        {
            "svhn@2": "svhn@1",
            "pear-store ui --store pear.store": served("pear-store ui --store pear.store", "/") + STOP,
            "~/.config/fish/completions/": "",
        },
        {"pip install": INSTALLS, 'eval "$(pear-store completion zsh)"': "is for zsh"},
    ),
    "docs/evaluate.md": Page({"my/pictures": "digits", "--min-top1 90": "--min-top1 5"}, {"pip install": INSTALLS}),
    "docs/training.md": Page(
        {
            "vit_base_patch16_224.augreg_in21k": "pear_tiny",
            "--plot": "--plot --epochs 6",
            "--set prune_epoch=5": "--set prune_epoch=5 --epochs 6 --overwrite",
            "epochs = 30": "epochs = 2",
            "MODEL": "pear_tiny",
        },
        {},
        ("mydata/scratched/1.jpg", "image,label,split"),
    ),
    "docs/export.md": Page({}, {}),
    "docs/hub.md": Page(
        {},
        {
            "pip install": INSTALLS,
            "hf upload": "uploads to the Hub",
            "pear-store add hf://": "reads the Hub: tests/pear_store/exchange runs it with a small one",
        },
    ),
    "docs/remotes.md": Page(
        {
            "/shared/pear": "$PWD/shared",
            "s3://bucket/pear --option region=eu-west-1": "$PWD/team",
            ', options={"region": "eu-west-1"}': "",
            "s3://bucket/pear": "file://$PWD/team",
            "vit_base_patch16_224.augreg_in21k": "pear_tiny",
            "pear-serve --store file://$PWD/team --backbone MODEL": served(
                "pear-serve --store file://$PWD/team --backbone pear_tiny", "/readyz"
            )
            + STOP,
            "MODEL": "pear_tiny",
            "../other-store": "bob",
        },
        {"pip install": INSTALLS},
        ("pear-remote.json",),
    ),
    "docs/router.md": Page(
        {"vit_base_patch16_224.augreg_in21k": "pear_tiny", ', device="cuda")': ")"},
        {},
    ),
    "docs/serving.md": Page(
        {
            "pear-serve --store pear.store --backbone MODEL --preload all": served(
                "pear-serve --store pear.store --backbone pear_tiny --preload all", "/readyz"
            ),
            "localhost:8090/v1/tasks/dtd/predict": "localhost:$PORT/v1/tasks/dtd/predict",
            '"MODEL"': '"pear_tiny"',
            "import Batcher\n": "import Batcher\nfrom router import Router\n"
            'router, image = Router("pear_tiny", "pear.store"), open("a.jpg", "rb").read()\n',
        },
        {
            "pip install": INSTALLS,
            "from pathlib import Path": EXAMPLES,
            "curl -F": EXAMPLES,
            "curl -H 'Content-Type: application/json'": EXAMPLES,
            "curl -H 'Content-Type: image/jpeg' --data-binary @a.jpg": EXAMPLES,
            "curl localhost:8090": EXAMPLES,
            "curl -H 'Inference-Header": EXAMPLES,
            "pear-serve --host 0.0.0.0": "listens to all the network: tests/router/serve/test_serving.py",
            'curl -H "Authorization': "needs the server above",
            "PEAR_STORE=./pear.store docker": "needs Docker",
        },
        ('{"task": "dtd", "label": null', "admitted"),
    ),
    "docs/method.md": Page(
        {
            "sources/*.safetensors": "svhn.safetensors digits.safetensors",
            "pear-store --store S": "pear-store init --store S && pear-store --store S",
            "MODEL": "pear_tiny",
            "--data oaks": "--data digits --epochs 2",
        },
        {},
    ),
    "docs/cluster.md": Page(
        {},
        {"pip install": INSTALLS, "pear-infer": CLUSTER, "pear-train": CLUSTER, "import os": CLUSTER},
        ("600 images in",),
    ),
}

ELSEWHERE = {
    "docs/tutorial.md": "tests/test_site.py runs it",
    "docs/peft.md": "tests/test_site.py runs it",
    "docs/formats.md": "tests/test_docs.py runs its reader",
    "docs/scale.md": "needs systemd, nginx or Kubernetes; tests/test_manifests.py runs its sed",
}
"""Pages whose commands another test runs, or none, with the reason"""


def commands(page: str, drawings: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """A page's commands and programs in their order, each with the output that the page shows below it."""
    found: list[tuple[str, str]] = []
    parts = FENCED.split(page)
    blocks = [("", block) for block in INDENTED.findall(parts[0])]
    for kind, fenced, prose in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        blocks += [(kind, fenced), *(("", block) for block in INDENTED.findall(prose))]
    for kind, block in blocks:
        lines = [re.sub(r"\s+# .*", "", line).strip() for line in block.splitlines() if line]
        if kind == "python":
            found.append((block, ""))
        elif kind == "toml":
            found.append((f"cat > tasks.toml <<'FILE'\n{block}FILE", ""))
        elif kind in ("sh", "bash") or PROGRAM.match(lines[0]):
            found += [(line, "") for line in lines]
        elif not kind and found and not block.strip().startswith(drawings):
            found[-1] = (found[-1][0], found[-1][1] + block)
    return found


def program(text: str) -> str:
    """A Python program as a command. One that awaits becomes a coroutine."""
    if "await " in text:
        text = f"import asyncio\n\nasync def main():\n{textwrap.indent(text, '    ')}\nasyncio.run(main())\n"
    return f"python - <<'PROGRAM'\n{text}PROGRAM"


def plain(line: str) -> str:
    """A line without what differs between runs and machines: numbers, precision, bars, rules and widths."""
    line = re.sub(r"[█-]{2,}|█|bfloat16|float32|(?<=1 thread)$|(?<=\d thread)s$", "", line)
    return " ".join(re.sub(r"\d+([.,]\d+)*", "N", line).split())


def small(labelled: Labelled) -> Labelled:
    return {split: pictures[:count] for (split, pictures), count in zip(labelled.items(), (60, 30, 40), strict=True)}


def call(main: click.Command, *words: str) -> None:
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code == 0, (words, done.output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the guides has: images, three tasks in a store, and their checkpoints."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_folder(folder / "digits", small(digits()))
        picture = next((folder / "digits/test").rglob("*.png"))
        for name in ("cat.jpg", "a.jpg", "b.png", "photo.png"):
            shutil.copy(picture, folder / name)
        for number, path in enumerate(sorted(Path("digits/train").rglob("*.png"))):
            to = Path("mydata", "scratched" if number % 8 == 0 else "fine", f"{number}.png")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
        shutil.copytree("mydata", "scratches")
        pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
        np.savez("labels.npz", x_train=pixels, y_train=np.arange(40) % 2)
        (folder / "tasks.toml").write_text(
            'epochs = 2\n[tasks.one]\ndata = "digits"\n[tasks.two]\ndata = "mydata"\n', "utf-8"
        )
        (folder / "list.csv").write_text("image,task\na.jpg,dtd\nb.png,svhn\n", "utf-8")
        train = ["--data", "digits", "--epochs", "1", "--method", "adapters"]
        for name, task, seed in (("old", "dtd", 0), ("dtd", "dtd", 1), ("svhn", "svhn", 2), ("digits", "digits", 3)):
            where = "linear" if task == "dtd" else "auto"
            call(
                pear_train.cli.main,
                task,
                "--out",
                f"{name}.safetensors",
                "--seed",
                str(seed),
                "--positions",
                where,
                *train,
            )
        store = ["--store", "pear.store"]
        call(pear_store.cli.main, "init", *store)
        for name in ("old", "dtd", "svhn", "digits"):
            call(pear_store.cli.main, "add", f"{name}.safetensors", *store)
        call(pear_store.cli.main, "tag", "dtd@2", "prod", *store)
        call(pear_store.cli.main, "export-peft", "dtd", "lora", *store)
        (folder / "lora/pear.json").unlink()  # which a LoRA of others lacks
        shutil.copytree("pear.store", "copies")
    labels = sorted(path.name for path in (folder / "digits/train").iterdir())
    (folder / "lora.txt").write_text("\n".join(labels), "utf-8")
    return folder


def free_port() -> int:
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        return int(at.getsockname()[1])


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_run(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, work = PAGES[name], tmp_path / "work"
    text = (ROOT / name).read_text()
    if name == "README.md":
        text = "## Install" + text.split("\n## Install")[1]  # test_site.py runs what is above, with its output
    monkeypatch.setenv("PEAR_STORE", "pear.store")
    monkeypatch.setenv("PEAR_CACHE_DIR", str(tmp_path / "cache"))
    shutil.copytree(folder, work)
    unused, steps, port = {*page.substitutes, *page.unrun}, [], str(free_port())
    for command, shown in commands(text, page.drawings):
        reasons = {start for start in page.unrun if command.startswith(start)}
        unused -= reasons
        if reasons:
            continue
        python = "\n" in command and "<<" not in command
        for old, new in page.substitutes.items():
            if old in command:
                unused.discard(old)
                command = command.replace(old, new)
        command = command.replace("$PWD", str(work)).replace("$PORT", port)
        steps.append((f"{{ {program(command) if python else command}\n}} 2>&1", shown))
    assert not unused, f"no command has this text: {sorted(unused)}"
    for command, shown, printed in run_steps(steps, tmp_path):
        lines = {plain(line) for line in printed.splitlines()}
        for line in shown.splitlines():
            assert plain(line) in lines, f"{command}\nshows:\n{line}\nprinted:\n{printed}"


def test_no_page_is_forgotten() -> None:
    pages = {str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
    assert {name for name in pages if commands((ROOT / name).read_text())} == {*PAGES, *ELSEWHERE}
