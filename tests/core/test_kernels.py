"""The tools that run the tests on other CPU kernels."""

from pathlib import Path

import kernels
import pytest
import torch
from any_kernels import AnyKernels


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 8, generator=generator), torch.randn(8, 8, generator=generator)


def test_any_kernel_rounds_by_shape_layout_and_alignment(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight = inputs
    moved = torch.empty(65)[1:].view(8, 8).copy_(weight)
    with AnyKernels():
        product = x @ weight
        assert torch.equal(x.clone() @ weight.clone(), product), "equal calls are equal"
        others = (x[:1] @ weight, x @ moved, x @ weight.T.contiguous().T, torch.bmm(x[None], weight[None])[0])
    for other in others:
        assert not torch.equal(other, product[: len(other)])
        torch.testing.assert_close(other, product[: len(other)])


def test_any_kernel_is_exact_where_all_are(inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = inputs[0].round().requires_grad_()
    with AnyKernels():
        assert torch.equal(x.sum(), x.detach().double().sum().float())
        (x @ inputs[1]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, inputs[1].sum(dim=1).expand(4, 8))


@pytest.mark.parametrize(
    ("vendor", "flags", "lacking"),
    [
        ("GenuineIntel", "sse4_1 avx2 fma", {"aten-avx512", "onednn-avx512", "onednn-amx", "intel"}),
        ("AuthenticAMD", "sse4_1 avx2 fma avx512f avx512bw avx512dq avx512vl", {"onednn-amx"}),
    ],
)
def test_settings_are_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, lacking: set[str]
) -> None:
    monkeypatch.setattr(kernels, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\nflags\t\t: {flags}\n\nvendor_id : {vendor}\n")
    found = {each.name: each for each in kernels.settings(tmp_path)}
    assert {name for name, each in found.items() if each.left_out} == lacking
    assert ("LD_PRELOAD" in found["mkl-avx2"].variables) == (tmp_path / "as_intel.so").exists()
    assert (tmp_path / "as_intel.so").exists() == (vendor != "GenuineIntel")
    assert found["onednn-amx"].left_out == "the CPU lacks amx_bf16, amx_int8, amx_tile"
