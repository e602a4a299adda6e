"""Which layers of a network a LoRA may adapt. Imports no torch."""

import difflib
from collections.abc import Iterable, Sequence


def target_names(layers: Iterable[str]) -> list[str]:
    """The last parts of the layers' names, each once and sorted: what a list of targets may hold."""
    return sorted({layer.rpartition(".")[2] for layer in layers})


def check_targets(targets: Iterable[str], layers: Sequence[str]) -> None:
    """Check that each target is the name, or the last part of the name, of a layer.

    Args:
        layers: names of the network's linear and convolution layers.

    Raises:
        ValueError: names the first target that matches no layer, and the nearest name that does.
    """
    for target in targets:
        if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
            valid = target_names(layers)
            near = difflib.get_close_matches(target, valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(valid)}"
            raise ValueError(f"{target!r} matches no layer of the network; {hint}")
