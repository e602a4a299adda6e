"""DeepSpeed's interface to the device."""

from typing import Any

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from emulated.device import NAME, here, wait


class EmulatedAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU accelerator, whose tensors lie on the device."""

    def __init__(self) -> None:
        super().__init__()
        self._name = NAME
        self._communication_backend_name = NAME

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def device_count(self) -> int:
        return 1

    def is_fp16_supported(self) -> bool:
        return True

    def on_accelerator(self, tensor: Any) -> bool:
        return here(tensor)

    def synchronize(self, device_index: int | None = None) -> None:
        wait("synchronize")
