"""Versions of the packages that influence a run's numbers."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dmdr-train", "torch", "deepspeed", "diffusers", "transformers", "peft")


@cache
def versions() -> dict[str, str | None]:
    """Return the installed version of each package that the numbers depend on; None if it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
