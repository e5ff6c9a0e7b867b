"""A backbone and a folder of images for tests of pear-infer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pear_store import Task
from tests.helpers.lists import make_list_folder


@pytest.fixture(autouse=True)
def _backbone_is_loaded(backbone_is_loaded: None) -> None:
    pass


@pytest.fixture
def work(tmp_path: Path, task_maker: Callable[..., Task]) -> Path:
    make_list_folder(tmp_path, task_maker, [(20 + i, 30) if i % 2 else (30, 20 + i, 3) for i in range(6)])
    return tmp_path
