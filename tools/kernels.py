"""The choices of CPU kernels on this machine, and the environment variables that select them.

    for setting in settings(folder):
        print(setting.name, setting.left_out or setting.variables)

Three libraries choose kernels by the CPU: ATen for its own loops, oneDNN for convolutions, and MKL for matrix products.
On a CPU of another maker than Intel, MKL chooses kernels by itself and accepts only the name COMPATIBLE. A library with
two functions, loaded before MKL, makes it treat the CPU as an Intel; MKL then computes as on an Intel with the same
instructions.
"""

import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
AS_INTEL = "int mkl_serv_intel_cpu(void) { return 1; }\nint mkl_serv_intel_cpu_true(void) { return 1; }\n"
FLAGS = {
    "sse4.1": {"sse4_1"},
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
}


@dataclass(frozen=True)
class Setting:
    """A choice of kernels.

    Args:
        needs: a key of `FLAGS`.
        as_intel: make MKL treat a CPU of another maker as an Intel.
        left_out: the reason why this machine cannot use the setting; empty if it can.
    """

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    needs: str = "sse4.1"
    as_intel: bool = False
    left_out: str = ""


SETTINGS = (
    Setting("any", {"PYTEST_ADDOPTS": "-p any_kernels"}),
    Setting("own"),
    Setting("intel", {}, "avx2", as_intel=True),
    Setting("aten-default", {"ATEN_CPU_CAPABILITY": "default"}),
    Setting("aten-avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
    Setting("aten-avx512", {"ATEN_CPU_CAPABILITY": "avx512"}, "avx512"),
    Setting("onednn-sse41", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    Setting("onednn-avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2"),
    Setting("onednn-avx512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "avx512"),
    Setting("onednn-amx", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "amx"),
    Setting("mkl-compatible", {"MKL_CBWR": "COMPATIBLE"}),
    Setting("mkl-avx2", {"MKL_CBWR": "AVX2"}, "avx2", as_intel=True),
    Setting("all-oldest", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}),
    Setting(
        "all-avx2",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
        "avx2",
        as_intel=True,
    ),
)


def settings(folder: Path) -> list[Setting]:
    """Return `SETTINGS` adapted to this machine.

    Args:
        folder: where the library for `as_intel` is built.
    """
    lines = dict(line.split(":", 1) for line in CPUINFO.read_text(encoding="utf-8").splitlines() if ":" in line)
    about = {name.strip(): value.strip() for name, value in lines.items()}
    flags, intel = set(about.get("flags", "").split()), about.get("vendor_id") == "GenuineIntel"
    library = folder / "as_intel.so"
    trouble = "" if intel else _build(library)
    found = []
    for each in SETTINGS:
        lacks = FLAGS[each.needs] - flags
        left_out = f"the CPU lacks {', '.join(sorted(lacks))}" if lacks else trouble if each.as_intel else ""
        if each.name == "intel" and intel:
            left_out = "the CPU is an Intel, so it is the same as own"
        preload = {"LD_PRELOAD": str(library)} if each.as_intel and not intel and not left_out else {}
        found.append(replace(each, variables=each.variables | preload, left_out=left_out))
    return found


def _build(library: Path) -> str:
    """Build the library; return the error, or an empty string."""
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    try:
        subprocess.run(command, input=AS_INTEL, text=True, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"gcc cannot build the library that makes MKL treat the CPU as an Intel ({error})"
    return ""
