"""The device's name for DeepSpeed, which reads it when it is imported. Imports neither torch nor DeepSpeed."""

import os


def name_device(device: str) -> None:
    """Tell DeepSpeed the device of a recipe; call this before DeepSpeed is imported.

    Args:
        device: `run.device`. Only "cpu" is told; otherwise DeepSpeed looks for a GPU. `DS_ACCELERATOR` has precedence.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
