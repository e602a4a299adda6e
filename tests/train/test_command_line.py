"""`dmdr-train` and run.py: what they say of themselves, and what they do not import for it."""

import os
import subprocess
import sys

import dmdr_train
import pytest
from dmdr_train.cli import COMMANDS, main, run_main
from dmdr_train.distributed.device_name import name_device

SLOW = {"torch", "deepspeed", "diffusers", "transformers", "datasets", "matplotlib"}


@pytest.mark.parametrize("program", [main, run_main])
def test_version(program: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        program(["--version"])  # type: ignore[operator]
    assert end.value.code == 0
    name = "dmdr-train" if program is main else "run.py"
    assert capsys.readouterr().out == f"{name} {dmdr_train.__version__}\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """It describes the program, or the command, in a whole sentence."""
    with pytest.raises(SystemExit) as end:
        main([*([command] if command else []), "--help"])
    assert end.value.code == 0
    _, about, _ = capsys.readouterr().out.split("\n\n", 2)
    assert about[0].isupper()
    assert about.endswith(".")


@pytest.mark.parametrize(
    ("device", "before", "after"), [("cpu", None, "cpu"), ("cpu", "cuda", "cuda"), ("auto", None, None)]
)
def test_deepspeed_is_told_of_a_cpu_alone(
    device: str, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", before or "")
    if before is None:
        monkeypatch.delenv("DS_ACCELERATOR")
    name_device(device)
    assert os.environ.get("DS_ACCELERATOR") == after


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "--config", "demo", "--print-config"]])
def test_an_answer_at_once_imports_nothing_slow(arguments: list[str]) -> None:
    program = (
        "import atexit, sys; from dmdr_train.cli import main\n"
        f"atexit.register(lambda: print('slow:', *{SLOW} & set(sys.modules)))\n"
        f"main({arguments})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["slow:"]
