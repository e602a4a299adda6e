"""Set before torch is imported: on tensors as small as the tests', a second thread costs more than it brings."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
