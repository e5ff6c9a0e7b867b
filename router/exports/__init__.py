"""Tasks as models that need no Pear: a state dict of timm's, or an ONNX file."""

from router.exports.onnx_file import export_onnx
from router.exports.timm_file import export_timm

__all__ = ["export_onnx", "export_timm"]
