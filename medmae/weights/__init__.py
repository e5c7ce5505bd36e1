"""Importers of published checkpoints: one module a family, recognised by the file's keys.

Files are only ever read as tensors (``weights_only=True`` or safetensors); nothing in them is executed.
"""
