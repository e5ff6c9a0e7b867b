"""The tool that trains pear_tiny."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from tools.pretrain_pear_tiny import write_weights


def test_the_weights_may_be_read_by_all_who_may_read_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_weights(nn.Linear(2, 3), tmp_path / "new" / "out.safetensors")
    written = tmp_path / "new" / "out.safetensors"
    assert written.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert {name: str(tensor.dtype) for name, tensor in load_file(written).items()} == {
        "weight": "torch.float16", "bias": "torch.float16",
    }  # fmt: skip
