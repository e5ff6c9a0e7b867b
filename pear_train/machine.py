"""The machine that a run goes on on: its device, its precision, and what rounding depends on."""

from typing import Any

import torch

from pear_train.choices import Dtype, Precision
from router import AdaptedBackbone, Backbone
from router.device import default_device, open_device
from router.precision import fast_precision


def on_device(backbone: Backbone, device: str | None) -> AdaptedBackbone:
    """A backbone to train adapters on; the device is a GPU where there is one, if none is named."""
    opened = open_device(device or default_device())
    return AdaptedBackbone(backbone, opened, torch.float32, for_training=True)


def choose_precision(dtype: Dtype, device: torch.device) -> Precision:
    """Of the forward; `auto` takes bfloat16 where the device is faster in it."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if fast_precision(device) == torch.bfloat16 else "float32"


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What the forward is cast to; None for float32, which is not cast."""
    return torch.bfloat16 if precision == "bfloat16" else None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What rounding depends on besides a run's identity: another one may give other bytes."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        return {**found, "gpu": torch.cuda.get_device_name(device)}
    return {**found, "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
