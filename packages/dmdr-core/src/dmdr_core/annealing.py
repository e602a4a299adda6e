"""The annealing curve of DMDR's dynamic phase. Steps count generator updates, from 0."""

from __future__ import annotations

import math

from dmdr_core.base import checks


def cosine_anneal(start: float, end: float, step: int, total: float) -> float:
    """Move from ``start`` to ``end`` along half a cosine.

    ``end + (start - end) · ½ (1 + cos(π step / total))``, and exactly ``end`` from ``step = total`` on (DMDR,
    arXiv 2511.13649, dynamic distribution guidance and dynamic renoise sampling).

    Args:
        start: the value at step 0.
        end: the value from ``total`` on.
        step: 0 or more.
        total: length of the phase, 0 or more. 0 means that there is no phase: the result is ``end``, also at step 0.
            ``math.inf`` means that it never ends: the result is ``start``.

    Returns:
        The value at ``step``.

    Raises:
        TypeError: an argument is not a number.
        ValueError: ``start`` or ``end`` is not finite, ``step`` is negative or not finite, ``total`` negative or NaN.
    """
    checks.number("start", start)
    checks.number("end", end)
    checks.number("step", step, 0.0)
    if total != math.inf:
        checks.number("total", total, 0.0)
    if step >= total:
        return float(end)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / total))
