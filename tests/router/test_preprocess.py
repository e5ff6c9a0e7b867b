"""Decoding: in workers, each image once, errors in their rows, unlike sizes apart."""

import os
import threading
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import router.preprocess
from router import ImageError, Preprocess, decode, prepare
from router.pictures import Picture
from tests.helpers.makers import record


def way(size: int = 48, **changes: Any) -> Preprocess:
    return Preprocess({**record()["preprocess"], "input_size": [3, size, size], **changes})


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20 + 9 * i, 33, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(4)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each path, or kind of object, was opened."""
    count: Counter[str] = Counter()
    plain = router.pictures.opened

    def opened(image: Any, *settings: Any) -> AbstractContextManager[Picture]:
        count[str(image) if isinstance(image, str | Path) else type(image).__name__] += 1
        return plain(image, *settings)

    monkeypatch.setattr(router.preprocess, "opened", opened)
    return count


def test_every_row_equals_its_image_prepared_alone(files: list[str]) -> None:
    small, large = way(48), way(64, crop_mode="center", crop_pct=0.9)
    ways = [small, large, small, large, small]
    images = [files[0], files[1], files[2], files[0], files[0]]
    batches, errors = prepare(images, ways)
    assert not errors
    assert [batch.rows.tolist() for batch in batches] == [[0, 2, 4], [1, 3]]
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 48, 48), (2, 3, 64, 64)]
    for batch in batches:
        for row, i in zip(batch.rows, batch.image_of, strict=True):
            alone = ways[row].normalise(ways[row].pixels(images[row]).unsqueeze(0))
            assert torch.equal(batch.images[i], alone[0])
    assert torch.equal(small(images[:3]), torch.stack([small([image])[0] for image in images[:3]]))


def test_an_image_is_opened_once_and_prepared_once_for_each_preprocessing(
    files: list[str], opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: Counter[int] = Counter()
    plain = Preprocess.resized
    monkeypatch.setattr(
        Preprocess, "resized", lambda self, picture: (prepared.update([self.size[0]]), plain(self, picture))[1]
    )
    array = np.zeros((9, 9, 3), np.uint8)
    images: list[Any] = [files[0], Path(files[0]), files[0], array, array]
    # equal records of two tasks are two objects
    pixels = decode(images, [way(48), way(48), way(64), way(48), way(48)])
    assert opened == {files[0]: 1, "ndarray": 1}
    assert prepared == {48: 2, 64: 1}
    assert pixels[0] is pixels[1]
    assert pixels[3] is pixels[4]


def test_rows_of_one_array_are_told_apart() -> None:
    batch: Any = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    pixels = decode(batch, [way(48)] * 3)
    assert len({bytes(p.numpy().tobytes()) for p in pixels if isinstance(p, torch.Tensor)}) == 3


def test_decoding_runs_in_workers_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)  # broken unless two images are being opened at once
    monkeypatch.setattr(
        Preprocess, "resized", lambda self, picture: (both.wait(), torch.zeros(3, 1, 1, dtype=torch.uint8))[1]
    )
    found = decode([np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)], [way()] * 2)
    assert all(isinstance(one, torch.Tensor) for one in found)


def test_a_bad_image_is_an_error_in_its_own_row(files: list[str]) -> None:
    images = [files[0], "nowhere.png", files[1], "nowhere.png"]
    found = decode(images, [way(48), way(48), way(48), way(64)])
    assert [isinstance(one, ImageError) for one in found] == [False, True, False, True]
    (batch,), errors = prepare(images, [way(48)] * 4)
    assert batch.rows.tolist() == [0, 2]
    assert {row: str(error) for row, error in errors.items()} == dict.fromkeys((1, 3), "nowhere.png: no such file")
    with pytest.raises(ImageError, match=r"^nowhere.png: no such file$"):
        way()(images)
    with pytest.raises(ImageError, match="image of type Tensor: expected a PIL image"):
        way()([torch.zeros(3, 48, 48), torch.zeros(3, 64, 64)])  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12: what this is about
def test_a_forked_child_decodes(files: list[str]) -> None:
    decode(files, [way()] * 4)  # the parent's workers are running
    child = os.fork()
    if child == 0:
        os._exit(0 if len(decode(files, [way()] * 4)) == 4 else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs: it waits for its parent's workers")
    assert status == 0
