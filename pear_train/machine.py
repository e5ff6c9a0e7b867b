"""The machine of a run: its device, its precision, and what rounding depends on."""

from typing import Any

import torch

from pear_train.choices import Dtype, Precision
from router import AdaptedBackbone, Backbone
from router.device import default_device, open_device
from router.precision import fast_precision


def on_device(backbone: Backbone, device: str | None) -> AdaptedBackbone:
    """The backbone on its device, ready to train adapters. If `device` is None, a GPU is taken if there is one."""
    opened = open_device(device or default_device())
    return AdaptedBackbone(backbone, opened, torch.float32, for_training=True)


def choose_precision(dtype: Dtype, device: torch.device) -> Precision:
    """The precision of the forward. `auto` gives bfloat16 if the device is faster in it."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if fast_precision(device) == torch.bfloat16 else "float32"


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The dtype of autocast. None for float32, which needs no cast."""
    return torch.bfloat16 if precision == "bfloat16" else None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What rounding depends on besides the run's identity. On another machine, the file's bytes may differ."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        return {**found, "gpu": torch.cuda.get_device_name(device)}
    return {**found, "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
