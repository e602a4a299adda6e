"""Quantised weights: the formats, the libraries that hold them, and what a folder says of its own. Imports no torch."""

import importlib.util
from typing import Any, Literal

Quantisation = Literal["nf4", "int8", "fp8"]

LIBRARIES: dict[str, str] = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""The library that quantises a network's linear layers, by format; also the name of the extra that installs it."""

BYTES_PER_WEIGHT: dict[str, float] = {"nf4": 0.5 + (1 + 4 / 256) / 64, "int8": 1.0, "fp8": 1.0}
"""Bytes of a weight of a linear layer, by format.

In NF4 a block of 64 weights has an absolute maximum of one byte, and 256 of these have one in float32 (double
quantisation, QLoRA, arXiv 2305.14314). In the other formats each row has a scale, which is not counted here. Biases and
all other layers keep the precision of the network.
"""


def method_of(config: dict[str, Any]) -> str | None:
    """The library that quantised the weights beside a part's config.json, as it says; None for plain weights."""
    quantised = config.get("quantization_config")
    if not quantised:
        return None
    return str(quantised.get("quant_method", "unknown")) if isinstance(quantised, dict) else str(quantised)


def check_readable(where: object, method: str) -> None:
    """Check that quantised weights can be read here.

    Raises:
        ValueError: no library that is supported wrote them, or it is not installed.
    """
    if method not in LIBRARIES.values():
        raise ValueError(
            f"{where} says that the weights are quantised ({method}), which is not supported: give the folder of the "
            "weights before quantisation"
        )
    if importlib.util.find_spec(method) is None:
        raise ValueError(
            f"{where} says that the weights are quantised ({method}), and {method} is not installed: "
            f"pip install dmdr-models[{method}], or give the folder of the weights before quantisation"
        )
