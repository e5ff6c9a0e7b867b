"""Exports tasks as models that need no Pear: a state dict for timm, or an ONNX file."""

from router.exports.onnx_file import export_onnx
from router.exports.timm_file import export_timm

__all__ = ["export_onnx", "export_timm"]
