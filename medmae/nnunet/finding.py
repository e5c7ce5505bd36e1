"""How nnU-Net finds the trainer, and the trainer what it needs; without importing nnU-Net or PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

KEY = "medmae"  # of what the trainer needs, in nnU-Net's plans


def plugin_folder() -> Path:
    """The folder to name in ``nnUNet_extTrainer``."""
    return Path(__file__).parent / "plugin"


def environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """``os.environ`` (or ``base``) with the plug-in's folder among ``nnUNet_extTrainer``."""
    found = dict(os.environ if base is None else base)
    folders = [f for f in found.get("nnUNet_extTrainer", "").split(os.pathsep) if f]
    if str(plugin_folder()) not in folders:
        folders.append(str(plugin_folder()))
    found["nnUNet_extTrainer"] = os.pathsep.join(folders)
    return found
