"""The examples of docs/serving.md run as they stand, but for the port."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pear_store import Store, Task
from tests.router.serve.conftest import picture
from tests.router.serve.test_serving import ROOT, served

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, task_maker: Callable[..., Task]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    for name in ("cat", "a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(picture(len(name), "JPEG"))
    with Store.create(tmp_path / "s") as store:
        for name in ("dtd", "svhn"):
            store.add(task_maker(name, seed=len(name)))
        store.tag("dtd", "prod")
    text = (ROOT / "docs" / "serving.md").read_text()
    shells = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    programs = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    programs = [one for one in programs if ":8090" in one]
    lines = [line for block in shells for line in block.splitlines()]
    assert (len(lines), len(programs)) == (7, 2)
    with served("--store", str(tmp_path / "s"), "--root", str(tmp_path), "--allow-urls") as process:

        def run(command: list[str]) -> str:
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            return done.stdout

        with process.client() as client:
            refused = client.post("/v1/tasks/dtd/predict", json={"url": f"http://127.0.0.1:{process.port}/metrics"})
            assert (refused.status_code, "not public" in refused.text) == (400, True)
        for line in lines:
            answer = run(
                ["bash", "-c", line.replace("curl", "curl -sS --fail-with-body", 1).replace("8090", str(process.port))]
            )
            assert '"error":{' not in answer
            assert '"dtd' in answer
        for program in programs:
            assert run([sys.executable, "-c", program.replace("8090", str(process.port))]).startswith("dtd-")
