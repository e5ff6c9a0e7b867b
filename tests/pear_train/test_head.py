"""pear_train/head.py: a classifier that learns what it will be written as."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pear_train import TrainConfig, open_dataset
from pear_train.head import Head
from pear_train.machine import on_device
from pear_train.run import TaskRun
from pear_train.to_task import to_task
from router import Backbone, Router
from router.tensors import dequantise, quantise
from tests.helpers.stripes import write_stripes


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_head_of_codes_answers_as_the_written_one_and_learns_as_a_float_one(bits: int) -> None:
    torch.manual_seed(0)
    features, targets = torch.randn(16, 12), torch.arange(16) % 3
    coded, plain = (Head(12, 3, one, torch.device("cpu")) for one in (bits, None))
    assert not coded(features).any()
    weight = torch.randn(3, 12)
    packed, scale = quantise(weight, bits, rank_axis=0)
    written = dequantise(packed, scale, (3, 12), bits, rank_axis=0)
    assert not torch.equal(written, weight)
    for head, given in ((coded, weight), (plain, written)):
        head.weight.data.copy_(given)
        head.bias.data.copy_(torch.tensor([0.5, -0.25, 0.0]))
        F.cross_entropy(head(features), targets).backward()
    torch.testing.assert_close(coded(features), plain(features))
    torch.testing.assert_close(coded.weight.grad, plain.weight.grad)
    assert [name for name, _ in coded.named_parameters()] == ["weight", "bias"]


def test_a_run_is_judged_by_the_head_that_is_written(backbone: Backbone, tmp_path: Path) -> None:
    write_stripes(tmp_path / "t.npz", 3, 24, 0)
    config = TrainConfig(task="t", method="linear", head_dtype="Q2", img_size=32, dtype="float32")
    run = TaskRun(config, on_device(backbone, "cpu"), open_dataset(str(tmp_path / "t.npz")))
    torch.nn.init.normal_(run.head.weight)
    router, rows = Router(backbone), range(len(run.val_pixels))
    router.add(to_task(run, {}))
    with torch.no_grad():
        found = run.head(run.features(run.val_pixels, torch.arange(len(rows))))
    expected = router.run(run.val_pixels.images(torch.arange(len(rows))), "t").logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
