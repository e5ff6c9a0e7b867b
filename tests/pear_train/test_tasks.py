"""Files of tasks: how they are read."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pear_train import ConfigError, read_tasks
from pear_train.cli import main
from pear_train.data import DataOptions

TEXT = """
epochs = 3
skip-unreadable = true
[tasks.a]
data = "café"
test_split = "none"
"""


def test_options_of_the_data_and_any_bytes_before(tmp_path: Path) -> None:
    file = tmp_path / "tasks.toml"
    for start in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(start + TEXT.encode())
        (entry,) = read_tasks(file, {"val_split": "dev", "lr": 0.1})
        assert (entry.data, entry.config.epochs, entry.config.lr) == (str(tmp_path / "café"), 3, 0.1)
        assert entry.data_options == DataOptions(val_split="dev", test_split="none", skip_unreadable=True)


def test_data_whose_name_no_file_can_have_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    names = ("a\\u0000b", "torch/\\u0000", "x" * 5000, "loop")
    text = "".join(f'[tasks.t{i}]\ndata = "{name}"\n' for i, name in enumerate(names))
    (tmp_path / "tasks.toml").write_text(text)
    done = CliRunner().invoke(main, ["--tasks", str(tmp_path / "tasks.toml"), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 1
    assert all(
        "no such file or folder" in row["error"] or "could not open" in row["error"] for row in json.loads(done.stdout)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("latin1"), "line 5: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (TEXT.encode("utf-16"), "is UTF-16: expected UTF-8; save it as UTF-8"),
        (TEXT.encode() + b"no_splits = true\n", "task 'a': no splits: all folders are classes"),
        (b'[tasks.a]\ndata = ""\n', "task 'a': expected data = "),
        (TEXT.encode() + b"train_split = 3\n", "task 'a': train_split = 3: expected str"),
    ],
)
def test_mistakes(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tasks.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_tasks(tmp_path / "tasks.toml", {})
