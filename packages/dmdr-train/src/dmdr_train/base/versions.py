"""What a checkpoint was made with."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dmdr-train", "torch", "deepspeed", "diffusers", "transformers", "peft")


@cache
def versions() -> dict[str, str | None]:
    """The installed version of each package that numbers depend on; None for one that is not installed as such."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
