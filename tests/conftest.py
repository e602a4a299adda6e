"""What holds for all tests."""

import os
from collections.abc import Iterator

import pytest

# Before torch is imported: on tensors as small as the tests', a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 leaves one of its own behind, which later tests in the same process would meet."""
    import torch.nn.functional as F

    own = F.linear
    yield
    F.linear = own
