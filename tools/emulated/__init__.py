"""A second device for machines that have only a CPU, as strict as CUDA about mixing devices.

    import emulated
    device = emulated.install()                   # torch.device("emulated", 0)
    weight = torch.ones(2, 3, device=device)
    weight @ torch.ones(3)                        # RuntimeError: … found at least two devices, emulated:0 and cpu

    python -m emulated PROGRAM …                  # a whole program, with this device instead of a GPU

Tensors of this device lie in the CPU's memory, and the CPU computes with them, so numbers equal the CPU's up to
rounding. The device restricts what a program may do. As with CUDA,

- an operation takes tensors of one device. Like CUDA, it also accepts some CPU tensors: numbers without a dimension in
  element-wise operations, and indices of `tensor[index]`;
- a random operation takes a generator of the tensor's device. Without a generator it draws from the device's own
  generator, which is not the CPU's;
- neither NumPy nor Python can read a tensor before it is copied to the CPU;
- a process group of the device takes only its tensors.

It is torch's `PrivateUse1` device, registered from Python, so torch itself handles its storages, views, modules,
gradients, optimizers and checkpoints as for any other device. `emulated.waits` counts how often the CPU
would have had to wait for the device, by the name of the operation, and `emulated.waiting` by the module that waited.
A copy from the CPU's memory waits unless it is `non_blocking`.

It does not emulate streams, limits of memory, generators of the device (`torch.Generator("emulated")` is an error), or
the rounding of a GPU.
"""

from emulated.device import NAME, install, waiting, waits

__all__ = ["NAME", "install", "replace_gpu", "waiting", "waits"]


def replace_gpu() -> None:
    """Install the device and its process group, and make it the device that DeepSpeed uses."""
    import os

    install()
    os.environ["LOCAL_RANK"] = "0"  # every process has its own device and sees no other
    os.environ["DS_ACCELERATOR"] = "cpu"  # replaced below; without it DeepSpeed would look for a GPU at import
    import deepspeed
    from deepspeed.accelerator import set_accelerator

    from emulated import process_group
    from emulated.deepspeed_accelerator import EmulatedAccelerator

    process_group.install()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled: gloo is sufficient
    set_accelerator(EmulatedAccelerator())
