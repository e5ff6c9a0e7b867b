"""Formats of other programs: PEFT, the Hugging Face Hub, timm and ONNX."""
