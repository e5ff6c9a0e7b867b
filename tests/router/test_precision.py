"""Which precision is taken on which device."""

from typing import Any

import pytest
import torch

from router import Backbone, Router, precision
from router.precision import fast_precision

CPU = torch.device("cpu")


def reported(monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, avx2: bool = True) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "avx2", "gain", "chosen"),
    [
        (True, True, True, 1.1, torch.bfloat16),
        (True, True, True, 0.5, torch.float32),
        (False, True, True, 1.1, torch.float32),
        (False, True, True, 2.0, torch.bfloat16),
        (False, False, False, 2.0, torch.bfloat16),
        (False, False, False, 1.1, torch.float32),
    ],
    ids=["tiles", "tiles that do not help", "vectors, no gain", "vectors, a gain", "another kind", "another, no gain"],
)
def test_a_cpu_is_asked_and_then_measured(
    amx: bool, avx512_bf16: bool, avx2: bool, gain: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported(monkeypatch, amx, avx512_bf16, avx2)
    monkeypatch.setattr(precision, "_measured_gain", lambda: gain)
    assert fast_precision(CPU) == chosen


def test_a_cpu_without_bfloat16_instructions_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement may err under load; where it cannot matter there is none."""
    reported(monkeypatch, amx=False, avx512_bf16=False)
    monkeypatch.setattr(precision, "_measured_gain", lambda: pytest.fail("measured"))
    assert fast_precision(CPU) == torch.float32


def test_load_that_hits_one_precision_only_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still except for a stall of the first rounds: one undisturbed round of each is enough."""
    now, readings = 0.0, 0

    def clock() -> float:
        nonlocal now, readings
        readings += 1
        bfloat16 = (readings - 1) // 2 % 2 == 1
        if readings % 2 == 0:  # the end of a round; bfloat16 takes half of float32's time, but most rounds are stalled
            now += (0.5 if bfloat16 else 1.0) + (100.0 if bfloat16 and readings < 60 else 0.0)
        return now

    monkeypatch.setattr("router.precision.time.perf_counter", clock)
    assert precision._measured_gain.__wrapped__() == pytest.approx(2.0)


def test_it_is_measured_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    precision._measured_gain.cache_clear()
    gain = precision._measured_gain()
    assert 0 < gain < 1000
    monkeypatch.setattr("router.precision.time.perf_counter", lambda: pytest.fail("again"))
    assert precision._measured_gain() == gain


def test_a_gpu_is_believed_without_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older GPUs answer that they have bfloat16 when emulation counts, in which they are slow."""
    asked: list[dict[str, Any]] = []

    class Device:
        def __init__(self, device: torch.device) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    def is_bf16_supported(**how: Any) -> bool:
        asked.append(how)
        return False

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert fast_precision(torch.device("cuda")) == torch.float32
    assert asked == [{"including_emulation": False}]


@pytest.mark.parametrize("chosen", [torch.bfloat16, torch.float32])
def test_a_router_takes_the_fast_one_when_told_auto(
    chosen: torch.dtype, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.router.fast_precision", lambda device: chosen)
    assert Router(backbone, dtype="auto")._adapted.dtype == chosen
    assert Router(backbone)._adapted.dtype == torch.float32
