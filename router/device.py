"""The device and the process that a backbone runs in."""

import os

import torch

from router.errors import BackboneError, ForkedError

_computed_in = 0
"""The id of the process that used a backbone first; 0 for none yet."""


def open_device(name: str | torch.device) -> torch.device:
    """The device, after a check that it can be used.

    Raises:
        BackboneError: it cannot be used.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:  # also for meta, which holds no values
        reason = " ".join(str(error).split(".")[0].split())
        raise BackboneError(f"device {str(name)!r} cannot be used: {reason}: choose another, such as 'cpu'") from None
    return device


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_process() -> None:
    """Raises a ForkedError if torch would wait for threads of the process that this one was forked from."""
    global _computed_in
    if _computed_in not in (0, os.getpid()) and torch.get_num_threads() > 1:
        raise ForkedError
    _computed_in = os.getpid()
