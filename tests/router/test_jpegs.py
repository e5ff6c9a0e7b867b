"""JPEGs decoded in batches by torchvision: on the CPU, and on a GPU where there is one."""

import copy
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

import router.jpegs
import router.preprocess
from pear_store import Store, Task
from pear_store.local.sources import Access
from router import Backbone, BackboneError, ImageError, JpegDecoder, Limits, Preprocess, Router, decode
from router.infer.lists import ImageList
from router.infer.work import infer
from router.pictures import LIMITS, ImageLike, PlainJpeg
from router.preprocess import Spent
from tests.helpers.jpegs import photograph, wide_profile
from tests.helpers.lists import read, run, write
from tests.helpers.makers import record

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")]
BY_NVJPEG = 24, 1.0
"""How far levels may move, most and on average. NVJPEG does not interpolate colours. The bound is a guess so far."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def decoder(request: pytest.FixtureRequest) -> JpegDecoder:
    return JpegDecoder(request.param)


def way(
    decoder: JpegDecoder | None, size: tuple[int, int] = (48, 48), limits: Limits = LIMITS, **changes: Any
) -> Preprocess:
    made = {**record()["preprocess"], "input_size": [3, *size], "reading": 2, **changes}
    return Preprocess(made, limits, decoder)


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(seed: int = 0) -> Image.Image:
    """A picture of 200 x 150 pixels that looks like no other."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((200, 150), Image.Resampling.BICUBIC)


def broken(data: bytes) -> bytes:
    """A JPEG with a sound header and end, and a Huffman table that means nothing."""
    at = data.index(b"\xff\xc4") + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


def check_near(
    found: Tensor | ImageError, expected: Tensor | ImageError, decoder: JpegDecoder, by_libjpeg: int = 4
) -> None:
    assert isinstance(found, Tensor) and isinstance(expected, Tensor), (found, expected)
    assert found.dtype == torch.uint8 and found.shape == expected.shape and found.device.type == "cpu"
    moved = (found.int() - expected.int()).abs().float()
    most, mean = (by_libjpeg, 0.5) if decoder.device.type == "cpu" else BY_NVJPEG
    assert moved.max() <= most and moved.mean() <= mean, (moved.max(), moved.mean())


@pytest.mark.parametrize(
    ("size", "saving", "most"),
    [
        ((96, 96), {}, 1),
        ((250, 190), {"progressive": True}, 1),
        ((250, 190), {"subsampling": 0}, 1),
        ((640, 480), {"subsampling": 1}, 4),
        ((1600, 1200), {}, 4),
        ((1203, 801), {}, 4),
    ],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_levels_are_nearly_those_of_rule_2(
    decoder: JpegDecoder, size: tuple[int, int], saving: dict[str, Any], most: int, interpolation: str
) -> None:
    """By libjpeg at most one level, if rule 2 does not decode the file at a part of its size."""
    data, spent = photograph(*size, **saving), Spent()
    (found,) = decode([data], [way(decoder, interpolation=interpolation)], spent)
    check_near(found, way(None, interpolation=interpolation).pixels(data), decoder, most)
    assert spent.by_jpegs == 1


def test_levels_at_edges_are_cut_off_after_each_axis_as_on_the_cpu(decoder: JpegDecoder) -> None:
    cells = np.random.default_rng(0).integers(0, 2, (30, 30), dtype=np.uint8) * 255
    data = saved(Image.fromarray(cells).resize((190, 180), Image.Resampling.NEAREST), quality=95)
    (found,) = decode([data], [way(decoder)])
    check_near(found, way(None).pixels(data), decoder, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(decoder: JpegDecoder, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data, spent = photograph(803, 601, exif=exif), Spent()  # shrunk to 201 x 151: the last row and column hold less
    (found,) = decode([data], [way(decoder, (40, 64))], spent)
    check_near(found, way(None, (40, 64)).pixels(data), decoder)
    assert spent.by_jpegs == 1


@pytest.mark.parametrize(
    "data",
    [
        saved(picture().convert("L")),
        saved(picture(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        saved(picture(), icc_profile=b"nonsense"),
    ],
    ids=["grey", "sRGB", "broken profile"],
)
def test_grey_and_srgb_are_plain(decoder: JpegDecoder, data: bytes) -> None:
    spent = Spent()
    (found,) = decode([data], [way(decoder)], spent)
    check_near(found, way(None).pixels(data), decoder)
    assert spent.by_jpegs == 1


@pytest.mark.parametrize(
    ("image", "changes"),
    [
        (saved(picture().convert("CMYK")), {}),
        (saved(picture(), keep_rgb=True), {}),
        (saved(picture(), icc_profile=wide_profile()), {}),
        (saved(picture()) + b"a trailer", {}),
        (saved(picture()) + b"\0" * 2_000_000 + b"\xff\xd9", {}),
        (saved(picture(), "MPO", save_all=True, append_images=[picture()]), {}),
        (saved(picture().resize((95, 200))), {}),
        (saved(picture(), "PNG"), {}),
        (picture(), {}),
        (saved(picture()), {"reading": 0}),
        (saved(picture()), {"reading": 1}),
        (saved(picture()), {"crop_mode": "center"}),
        (saved(picture()), {"interpolation": "lanczos"}),
    ],
    ids=[
        "CMYK",
        "RGB",
        "profile",
        "trailer",
        "large trailer",
        "MPO",
        "small",
        "PNG",
        "PIL",
        "rule 0",
        "rule 1",
        "center",
        "lanczos",
    ],
)
def test_all_else_is_read_by_pillow_to_the_bit(
    decoder: JpegDecoder, image: bytes | Image.Image, changes: dict[str, Any]
) -> None:
    spent = Spent()
    (found,) = decode([image], [way(decoder, **changes)], spent)
    assert isinstance(found, Tensor) and torch.equal(found, way(None, **changes).pixels(image))
    assert spent.by_jpegs == 0


def test_a_bad_file_costs_only_itself_and_says_what_pillow_says(decoder: JpegDecoder, tmp_path: Path) -> None:
    good = [saved(picture(seed)) for seed in range(5)]
    files = {
        "0.jpg": good[0], "broken.jpg": broken(good[1]), "1.jpg": good[1], "cut.jpg": good[2][:900], "2.jpg": good[2],
        "text.jpg": b"no picture", "3.jpg": good[3], "empty.jpg": b"", "4.jpg": good[4],
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    images, spent = [*(tmp_path / name for name in files), tmp_path / "gone.jpg"], Spent()
    found = decode(images, [way(decoder)] * len(images), spent)
    expected = decode(images, [way(None)] * len(images))
    assert [str(one) for one in found if isinstance(one, ImageError)] == [
        str(one) for one in expected if isinstance(one, ImageError)
    ]
    assert [i for i, one in enumerate(found) if isinstance(one, ImageError)] == [1, 3, 5, 7, 9]
    assert str(found[1]).startswith(f"{tmp_path / 'broken.jpg'}: cannot be read: ")
    for i in (0, 2, 4, 6, 8):
        check_near(found[i], expected[i], decoder)
    assert spent.by_jpegs == 5


@pytest.fixture
def calls(decoder: JpegDecoder, monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """The files of each call of torchvision. It refuses the picture of seed 7."""
    asked: list[list[bytes]] = []
    plain, refused = decoder._decoded, saved(picture(7))

    def decoded(jpegs: list[PlainJpeg]) -> list[Tensor]:
        assert decoder._turn.locked(), "threads take turns"
        files = [jpeg.data for jpeg in jpegs]
        asked.append(files)
        if refused in files:
            raise RuntimeError("not supported")
        return plain(jpegs)

    monkeypatch.setattr(decoder, "_decoded", decoded)
    return asked


def test_pillow_reads_what_the_decoder_refuses(decoder: JpegDecoder, calls: list[list[bytes]]) -> None:
    files, spent = [saved(picture(seed)) for seed in (6, 7, 8)], Spent()
    found = decode(files, [way(decoder)] * 3, spent)
    for pixels, data in zip(found, files, strict=True):
        check_near(pixels, way(None).pixels(data), decoder)
    assert isinstance(found[1], Tensor) and torch.equal(found[1], way(None).pixels(files[1]))
    assert calls == [files, files[:1], files[1:2], files[2:]] and spent.by_jpegs == 2


def test_pillow_reads_what_cannot_be_resized_there_or_has_another_size(
    decoder: JpegDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, spent = saved(picture()), Spent()
    plain = decoder._decoded
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_decoded", lambda jpegs: [pixels[:, 1:] for pixels in plain(jpegs)])
        (other,) = decode([data], [way(decoder)], spent)

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(Preprocess, "resized_on_device", fail)
    (unresized,) = decode([data], [way(decoder)], spent)
    for found in (other, unresized):
        assert isinstance(found, Tensor) and torch.equal(found, way(None).pixels(data))
    assert spent.by_jpegs == 0


def test_paths_urls_bytes_and_open_files(decoder: JpegDecoder, tmp_path: Path, calls: list[list[bytes]]) -> None:
    for seed in range(4):
        (tmp_path / f"{seed}.jpg").write_bytes(saved(picture(seed)))
    os.mkfifo(tmp_path / "pipe.jpg")
    spent = Spent()
    with open(tmp_path / "3.jpg", "rb") as file:
        images: list[ImageLike] = [
            tmp_path / "0.jpg", (tmp_path / "1.jpg").as_uri(), saved(picture(2)), file, tmp_path / "pipe.jpg",
            str(tmp_path / "0.jpg"),  # decoded once
        ]  # fmt: skip
        found = decode(images, [way(decoder)] * 6, spent)
    for seed in range(4):
        check_near(found[seed], way(None).pixels(tmp_path / f"{seed}.jpg"), decoder)
    assert "pipe" in str(found[4]) and isinstance(found[4], ImageError)
    assert found[5] is found[0]
    assert [len(files) for files in calls] == [4] and spent.by_jpegs == 4
    assert spent.read_s > 0 and spent.decode_s > 0


def test_one_file_in_several_ways_is_decoded_once(decoder: JpegDecoder, calls: list[list[bytes]]) -> None:
    data = photograph(640, 480)
    changes: list[dict[str, Any]] = [
        {},
        {"size": (64, 64)},
        {"reading": 1},
        {"crop_mode": "center"},
        {"size": (300, 300)},
    ]
    found = decode([data] * 5, [way(decoder, **one) for one in changes])
    for pixels, one in zip(found, changes, strict=True):
        check_near(pixels, way(None, **one).pixels(data), decoder)
    assert len(calls) == 1
    for pixels, one in zip(found[2:], changes[2:], strict=True):
        assert isinstance(pixels, Tensor) and torch.equal(pixels, way(None, **one).pixels(data))


def test_large_pictures_are_refused_before_they_are_decoded(decoder: JpegDecoder, calls: list[list[bytes]]) -> None:
    limits = Limits(max_pixels=200 * 150 - 1)
    (found,) = decode([saved(picture())], [way(decoder, limits=limits)])
    assert isinstance(found, ImageError) and "200 x 150 pixels, the limit is 29999" in str(found)
    assert not calls


def test_pixels_and_files_in_memory_are_bounded_and_the_order_is_kept(
    decoder: JpegDecoder, calls: list[list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.jpegs, "PIXELS", 2 * 200 * 150)
    monkeypatch.setattr(router.preprocess, "FILES", 4)
    files = [saved(picture(seed)) for seed in range(6)]
    files[2:2] = [photograph(640, 480)]  # larger than the bound: alone
    found = decode(files, [way(decoder)] * 7)
    for pixels, data in zip(found, files, strict=True):
        check_near(pixels, way(None).pixels(data), decoder)
    assert calls == [files[:2], files[2:3], files[3:4], files[4:6], files[6:]]


def test_threads_take_turns(decoder: JpegDecoder, calls: list[list[bytes]]) -> None:
    files = [saved(picture(seed)) for seed in range(4)]
    expected = decode(files, [way(decoder)] * 4)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: decode(list(files), [way(decoder)] * 4), range(16)):
            for pixels, one in zip(found, expected, strict=True):
                assert isinstance(pixels, Tensor) and isinstance(one, Tensor) and torch.equal(pixels, one)
    assert len(calls) == 17


def test_a_device_without_a_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support. More\nlines")

    with pytest.raises(BackboneError, match=r"^device 'nowhere' cannot be used"):
        JpegDecoder("nowhere")
    monkeypatch.setattr("torchvision.io.decode_jpeg", gone)
    text = (
        "device 'cpu' cannot decode JPEGs: decode_jpegs_cuda: torchvision not compiled with nvJPEG support: install a "
        "torchvision with NVJPEG for this GPU, or let Pillow decode them"
    )
    with pytest.raises(BackboneError) as error:
        JpegDecoder("cpu")
    assert str(error.value) == text
    monkeypatch.delattr("torchvision.io.decode_jpeg")  # it is deprecated
    with pytest.raises(BackboneError, match="device 'cpu' cannot decode JPEGs: cannot import name 'decode_jpeg'"):
        JpegDecoder("cpu")


# ---- routers and pear-infer ---------------------------------------------------------------------


@pytest.fixture
def work(task_maker: Callable[..., Task], tmp_path: Path) -> Path:
    """A store with a task that is read by rule 2, and a list of three JPEGs, the last of which is broken."""
    plain = task_maker("a", seed=1)
    changed = {**plain.record, "preprocess": {**plain.record["preprocess"], "reading": 2}}
    with Store.create(tmp_path / "s") as store:
        store.add(Task(changed, plain.tensors))
    for seed in range(2):
        (tmp_path / f"{seed}.jpg").write_bytes(saved(picture(seed)))
    (tmp_path / "2.jpg").write_bytes(broken(saved(picture())))
    write(tmp_path / "list.csv", pd.DataFrame({"image": [f"{i}.jpg" for i in range(3)], "task": "a"}))
    return tmp_path


def test_a_router_takes_a_decoder(
    decoder: JpegDecoder, calls: list[list[bytes]], backbone: Backbone, work: Path
) -> None:
    images = [work / f"{i}.jpg" for i in range(3)]
    with Router(backbone, work / "s", jpegs=decoder) as router, Router(backbone, work / "s") as other:
        found, expected = (one.run(images, "a", on_error="return") for one in (router, other))
        assert found.failures.keys() == {2}
        for row in range(2):
            moved = (found[row].logits - expected[row].logits).abs().max()
            assert moved < 0.1 * expected[row].logits.abs().max()
        assert found[2].error == expected[2].error
        assert len(calls[0]) == 3


def test_a_router_is_sent_with_its_decoder(decoder: JpegDecoder) -> None:
    """A copy is made of the same parts as one in another process."""
    again = copy.deepcopy(Router("pear_tiny", device="cpu", jpegs=decoder))
    assert again.jpegs is not None and again.jpegs is not decoder
    assert again.jpegs.device == decoder.device


def test_pear_infer_counts_what_the_decoder_decoded(decoder: JpegDecoder, backbone: Backbone, work: Path) -> None:
    options = {
        "batch_size": 2, "top": 1, "dtype": "float32", "device": "cpu", "threshold": "stored", "tasks": None,
        "prefix": "", "max_pixels": 10**6, "decode": "gpu",
    }  # fmt: skip
    listed = ImageList.scan(str(work / "list.csv"), ["image", "task"], "utf-8-sig")
    with Store(work / "s") as store:
        router = Router(backbone, store, jpegs=decoder)
        report = infer(router, store, listed, work / "gpu.csv", options, access=Access())
        assert (report["by_gpu"], report["predictions"], report["errors"]) == (2, 2, 1)
    done = run(work / "list.csv", work / "cpu.csv", "--store", work / "s", "--device", "cpu")
    assert done.exit_code == 0 and "on the GPU" not in done.stderr
    for one, other in zip(read(work / "gpu.csv"), read(work / "cpu.csv"), strict=True):
        assert (one["image"], one["error"]) == (other["image"], other["error"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decode", "gpu", "--device", "cpu"], "--decode gpu needs a GPU, the device is cpu: leave it out"),
        (["--decode", "gpu", "--ray"], "--decode gpu does not work with --ray yet: leave one of them out"),
        (["--decode", "beside"], "--decode apart and --decode beside are for a cluster: give --ray, too"),
    ],
)
def test_pear_infer_refuses_to_decode_where_it_cannot(work: Path, options: list[str], message: str) -> None:
    done = run(work / "list.csv", work / "out.csv", "--store", work / "s", *options)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr
