"""A backbone and a folder of images for tests of pear-infer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pear_store import Task
from router import Backbone, load_backbone
from tests.helpers.lists import make_list_folder


@pytest.fixture(autouse=True)
def backbone_is_loaded(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command would load it anew, which takes as long as all else that most of these tests do."""

    def load(name: str, weights: str | None) -> Backbone:
        return backbone if (name, weights) == ("pear_tiny", None) else load_backbone(name, weights)

    monkeypatch.setattr("router.router.load_backbone", load)


@pytest.fixture
def work(tmp_path: Path, task_maker: Callable[..., Task]) -> Path:
    make_list_folder(tmp_path, task_maker, [(20 + i, 30) if i % 2 else (30, 20 + i, 3) for i in range(6)])
    return tmp_path
