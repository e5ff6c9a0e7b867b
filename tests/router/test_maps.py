"""Positions whose channels come first: convolutional networks, through the same op."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pear_store import Task
from pear_store.format.checkpoint import Branch
from pear_store.format.codes import matrix_values, up_values
from router import AdaptedBackbone, Backbone, BackboneError, Router, choose_positions, load_backbone
from router.backbone import share
from tests.helpers.backbones import random_module, random_task
from tests.helpers.predictions import whole

CPU = torch.device("cpu")
NETWORKS = {
    "test_resnet": ["layer1.0", "layer2.0", "layer3.0.downsample.0", "layer4.0.conv1"],
    "mobilenetv3_small_050": ["blocks.0.0", "blocks.1.1", "blocks.3.0.conv_pw", "blocks.2.1.se", "conv_head"],
    "convnext_atto": ["stages.0", "stages.0.blocks.0.mlp", "stages.1.blocks.1", "stages.2.blocks.0.conv_dw", "stem.1"],
}
SIZE = (64, 96)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Backbone:
    return Backbone(random_module(request.param), request.param)


def tasks_of(network: Backbone) -> list[Task]:
    positions = NETWORKS[network.name]
    return [
        random_task(
            network, positions[: len(positions) - i], f"t{i}", seed=i, size=SIZE, activation=activation, scale=0.3
        )
        for i, activation in enumerate(("identity", "relu", "gelu"))
    ]


def images_of(count: int, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(3))


def by_convolutions(network: Backbone, task: Task, images: Tensor) -> Tensor:
    """The logits by hooks that add two 1x1 convolutions, the first with the stride that fits."""
    module = share(network.module)
    phi: Callable[[Tensor], Tensor] = {"identity": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU()}[task.activation]
    for position, branches in task.positions.items():

        def add(_: nn.Module, args: tuple[Tensor, ...], y: Tensor, branches: list[Branch] = branches) -> Tensor:
            x = args[0]
            for branch in branches:
                adapter = task.adapters[branch.adapter]
                down, up = (
                    torch.tensor(np.array(values)).t()[:, :, None, None]
                    for values in (matrix_values(adapter.down, task.tensors), up_values(adapter, task.tensors))
                )
                y = y + branch.scale * F.conv2d(phi(F.conv2d(x, down, stride=round(x.shape[-1] / y.shape[-1]))), up)
            return y

        module.get_submodule(position).register_forward_hook(add)
    assert task.head is not None
    weight, bias = (torch.tensor(np.array(matrix_values(task.head.weight, task.tensors))), task.tensors[task.head.bias])
    with torch.inference_mode():
        return F.linear(module(images), weight, torch.tensor(np.frombuffer(bias.data, "<f4").copy()))


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-5)


def test_a_task_equals_two_convolutions_beside_each_position(network: Backbone) -> None:
    images = images_of(3)
    with Router(network, merge=False) as router:
        for task in tasks_of(network):
            found = whole(router.run(images, router.add(task)))
            expected = by_convolutions(network, task, images)
            agree(found, expected)
            without = by_convolutions(network, random_task(network, [], size=SIZE), images)
            assert found.shape == without.shape and (found - without).abs().max() > 0.01


def test_mixed_batches_equal_rows_alone_and_shared_images(network: Backbone) -> None:
    images, names = images_of(6), ["t0", "t1", "t2", "t2", "t0", "t1"]
    with Router(network, merge=False) as router:
        for task in tasks_of(network):
            router.add(task)
        alone = torch.cat([whole(router.run(images[i : i + 1], name)) for i, name in enumerate(names)])
        agree(whole(router.run(images, names)), alone)
        shared = router.run_all(images, ["t0", "t1", "t2"])
        agree(torch.stack([whole(shared[name])[i] for i, name in enumerate(names)]), alone)


def test_pointwise_convolutions_are_merged(network: Backbone) -> None:
    positions = choose_positions(network.module, "pointwise")
    assert len(positions) > 2
    task, images = random_task(network, positions[:6], size=SIZE), images_of(2)
    with Router(network, merge=False) as plain, Router(network, merge=True) as merging:
        expected = whole(plain.run(images, plain.add(task)))
        agree(whole(merging.run(images, merging.add(task))), expected)
        assert (plain._merger.merges, merging._merger.merges) == (0, 1)


def test_what_is_no_position_is_named() -> None:
    class Odd(nn.Module):
        """Has parts that are none: in place, of another size, of two tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.act, self.valid, self.pool = nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(3)
            self.flat = nn.Flatten()
            self.pretrained_cfg = {"input_size": (3, 16, 16)}

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.flat(self.pool(self.valid(self.act(x * 1)))).float()
            return found

        def reset_classifier(self, classes: int) -> None:
            pass

    adapted = AdaptedBackbone(load_backbone(Odd()), CPU, torch.float32)
    for position, message in {
        "act": "'act' of Odd changes its input in place: expected a module that does not; choose its parent",
        "valid": r"'valid' of Odd makes \[1, 4, 14, 14\] of \[1, 3, 16, 16\]: expected equal axes except for channels",
        "pool": r"'pool' of Odd makes \[1, 4, 3, 3\] of \[1, 4, 14, 14\]: expected",
        "flat": r"'flat' of Odd makes \[1, 36\] of \[1, 4, 3, 3\]: expected",
    }.items():
        with torch.inference_mode(), pytest.raises(BackboneError, match=message):  # as within a run
            adapted.attach([position])
