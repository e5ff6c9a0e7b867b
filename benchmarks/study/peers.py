"""What the study's peers train on a frozen model: PEFT's tuners, and forms of other papers in a few lines of hooks."""

from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor, nn


def adapt(model: nn.Module, peer: str) -> tuple[nn.Module, int]:
    """A model with what the peer trains, and how many numbers it has to keep for a task.

    Args:
        peer: ``full``; or ``kind:rank``, of PEFT ``lora``, ``lora-qkv`` (with ``:alpha``), ``vera`` or ``vblora``; of
            the forms here ``adapter+``, ``repadapter``, ``fact`` or ``lora-xs``.
    """
    if peer == "full":
        return model, sum(p.numel() for p in model.parameters())
    kind, *numbers = peer.split(":")
    rank = int(numbers[0])
    if kind in FORMS:
        model.requires_grad_(False)
        FORMS[kind](model, rank)
        return model, sum(p.numel() for p in model.parameters() if p.requires_grad)
    import peft

    linears = ["qkv"] if kind.endswith("-qkv") or kind == "vera" else ["qkv", "proj", "fc1", "fc2"]
    targets = r"blocks\.\d+\..*(" + "|".join(linears) + ")"
    config: Any
    if kind.startswith("lora"):
        config = peft.LoraConfig(
            r=rank, lora_alpha=int(numbers[1]) if len(numbers) > 1 else rank, target_modules=targets
        )
    elif kind == "vera":
        config = peft.VeraConfig(r=rank, target_modules=targets, save_projection=False)
    elif kind.startswith("vblora"):
        config = peft.VBLoRAConfig(r=rank, target_modules=targets, num_vectors=90, vector_length=64)
    else:
        raise click.ClickException(f"unknown peer {peer!r}")
    made = peft.get_peft_model(model, config)
    trained = {name: p.numel() for name, p in made.named_parameters() if p.requires_grad}
    if kind.startswith("vblora"):  # of the 90 logits a vector it keeps the best two: their indices and one weight
        return made, sum(count * 2 // 90 if "logits" in name else count for name, count in trained.items())
    return made, sum(trained.values())


def _after(model: nn.Module, name: str, form: nn.Module) -> None:
    """`form` on a module's output; its parameters become the model's."""
    model.get_submodule(name).register_forward_hook(lambda _, __, y: form(y))
    model.add_module("form_" + name.replace(".", "_"), form)


def _adapter_plus(model: nn.Module, rank: int) -> None:
    """Adapter+ (Steitz and Roth, CVPR 2024): a bottleneck with gelu and a scale for each channel, after each block."""

    class AdapterPlus(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
            self.scale = nn.Parameter(torch.ones(width))
            for linear in (self.down, self.up):
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
                nn.init.zeros_(linear.bias)

        def forward(self, y: Tensor) -> Tensor:
            found: Tensor = y + self.scale * self.up(nn.functional.gelu(self.down(y)))
            return found

    for name in _blocks(model):
        _after(model, name, AdapterPlus(_width(model)))


def _repadapter(model: nn.Module, rank: int) -> None:
    """RepAdapter (Luo et al., arXiv 2302.08106): linear, before attention and MLP, the way up in two groups."""

    class RepAdapter(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.down = nn.Conv1d(width, rank, 1)
            self.up = nn.Conv1d(rank, width, 1, groups=2)
            nn.init.xavier_uniform_(self.down.weight)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                assert zero is not None
                nn.init.zeros_(zero)

        def forward(self, y: Tensor) -> Tensor:
            added: Tensor = self.up(self.down(y.transpose(1, 2))).transpose(1, 2)
            return y + added

    for name in _blocks(model):
        for norm in ("norm1", "norm2"):
            _after(model, f"{name}.{norm}", RepAdapter(_width(model)))


def _fact(model: nn.Module, rank: int) -> None:
    """FacT (Jie and Deng, arXiv 2212.03145), tensor-train form: the d x d parts of all Linears share U and V, and each
    has a core between them."""
    width = _width(model)
    shared = nn.ParameterDict({"u": torch.empty(width, rank), "v": torch.zeros(rank, width)})
    nn.init.kaiming_uniform_(shared["u"], a=5**0.5)
    model.add_module("form_fact", shared)
    cores = nn.ParameterDict()
    model.add_module("form_cores", cores)

    def add(name: str, wide_in: int, wide_out: int) -> None:
        core = nn.Parameter(torch.empty(wide_in, wide_out, rank, rank).uniform_(-1, 1) / rank**0.5)
        cores[name.replace(".", "_")] = core

        def hook(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = args[0].reshape(*args[0].shape[:-1], wide_in, width) @ shared["u"]  # [batch, token, wide_in, rank]
            h = torch.einsum("btir,iors->btos", x, core.to(x.dtype))
            found: Tensor = y + (h @ shared["v"]).flatten(-2)
            return found

        model.get_submodule(name).register_forward_hook(hook)

    parts = {"attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.fc1": (1, 4), "mlp.fc2": (4, 1)}
    for name in _blocks(model):
        for linear, (wide_in, wide_out) in parts.items():
            add(f"{name}.{linear}", wide_in, wide_out)


def _lora_xs(model: nn.Module, rank: int) -> None:
    """LoRA-XS (Bałazy et al., arXiv 2405.17604): at every Linear of the blocks a matrix [rank, rank] between the first
    singular vectors of its own weight, those of the output times their singular values."""
    matrices = nn.ParameterDict()

    def add(name: str, linear: nn.Linear) -> None:
        u, values, vt = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        down, up = vt[:rank].t().contiguous(), (u[:, :rank] * values[:rank]).t().contiguous()
        matrix = matrices[name.replace(".", "_")] = nn.Parameter(torch.randn(rank, rank) * 1e-5)
        linear.register_forward_hook(lambda _, args, y: y + args[0] @ down @ matrix @ up)

    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            add(name, module)
    model.add_module("form_lora_xs", matrices)


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[0] == "blocks"]


def _width(model: nn.Module) -> int:
    width = model.num_features
    assert isinstance(width, int)
    return width


FORMS: dict[str, Callable[[nn.Module, int], None]] = {
    "adapter+": _adapter_plus,
    "repadapter": _repadapter,
    "fact": _fact,
    "lora-xs": _lora_xs,
}
