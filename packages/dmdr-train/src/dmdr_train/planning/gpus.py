"""Well-known GPUs: their memory and their peak rates, from their makers' data sheets. Imports no torch."""

import difflib
from dataclasses import dataclass

from dmdr_train.base.errors import UserError

UTILISATION = 0.27
"""The share of a GPU's peak rate while it executes kernels; 16 % to 33 % on an H200, see docs/benchmarks.md."""

LAUNCH = 45e-6
"""Seconds that the CPU takes for each kernel, with Python and autograd; 44 to 56 µs beside an H200."""

KERNELS_PER_TENSOR = 4
"""Kernels for each trained tensor in a backward pass and update: DeepSpeed copies its gradient, and takes its norm."""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        memory: in GB, as its maker says.
        half: dense operations per second in bf16 and fp16, in units of 10^12, without sparsity.
        single: in fp32.
    """

    name: str
    memory: int
    half: float
    single: float

    def rate(self, precision: str) -> float:
        """Operations per second in a precision of the training, at `UTILISATION`."""
        return (self.single if precision == "fp32" else self.half) * 1e12 * UTILISATION


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        GPU("B200", 180, 2250, 75),
        GPU("H200", 141, 989, 67),
        GPU("H100", 80, 989, 67),
        GPU("A100-80", 80, 312, 19.5),
        GPU("A100-40", 40, 312, 19.5),
        GPU("MI300X", 192, 1307, 163),
        GPU("L40S", 48, 362, 91.6),
        GPU("RTX 6000 Ada", 48, 364, 91.1),
        GPU("A6000", 48, 155, 38.7),
        GPU("RTX 5090", 32, 210, 105),
        GPU("RTX 4090", 24, 165, 82.6),
        GPU("RTX 3090", 24, 71, 35.6),
        GPU("L4", 24, 121, 30.3),
        GPU("A10G", 24, 70, 31.2),
        GPU("V100", 32, 125, 15.7),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU with this name, in any case, with spaces or hyphens.

    Raises:
        UserError: it is not in the table.
    """
    key = name.lower().replace("-", " ")
    known = {found.replace("-", " "): gpu for found, gpu in GPUS.items()}
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1)
    names = ", ".join(gpu.name for gpu in GPUS.values())
    hint = f"did you mean {known[near[0]].name}? The table has" if near else "give one of"
    raise UserError("--gpu", f"no GPU {name!r} in the table; {hint} {names}")
