"""Whether two programs drew the same picture."""

import numpy as np


def same_picture(found: np.ndarray, expected: np.ndarray, half: bool = False) -> bool:
    """Whether two pictures of 8 bits are equal up to rounding.

    Two programs hold the same weights in memory of another layout, and a CPU may choose other kernels for them. Their
    floats then differ in the last bits, and a value near the middle of two levels rounds the other way. Such values are
    rare: at most one in fifty may differ, and by one level.

    Args:
        found: `[H, W, C]` uint8.
        expected: the same.
        half: the network computed in half precision. Values may then differ by four levels, and by a quarter of a
            level on average.
    """
    if found.shape != expected.shape or found.dtype != np.uint8 or expected.dtype != np.uint8:
        return False
    apart = np.abs(found.astype(int) - expected.astype(int))
    if half:
        return bool(apart.max() <= 4 and apart.mean() <= 0.25)
    return bool(apart.max() <= 1 and apart.mean() <= 0.02)
