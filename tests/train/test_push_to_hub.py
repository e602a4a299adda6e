"""`dmdr-train export … --push-to-hub`, with a hub that is not there."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from dmdr_train.cli import main
from dmdr_train.run import python_api


class Hub:
    """Stands in for HfApi, and keeps what it is asked."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    error: Exception | None = None

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.asked.append((repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append((repo_id, options))

    upload_file = upload_folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    def export(run: str, output: str, layout: str) -> str:
        Path(output).write_text("weights") if output.endswith(".safetensors") else Path(output).mkdir()
        return "step-4"

    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "error", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(python_api, "export", export)
    return Hub


def push(output: Path, *more: str) -> None:
    main(["export", "runs/demo", "-o", str(output), *more])


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_goes_to_a_repository_that_is_private_unless_told(
    hub: type[Hub], tmp_path: Path, public: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    push(tmp_path / "student", "--push-to-hub", "me/student", *(["--public"] if public else []))
    (made, options), (filled, given) = hub.asked
    assert made == filled == "me/student"
    assert options == {"private": not public, "exist_ok": True}
    assert given["folder_path"] == tmp_path / "student"
    assert capsys.readouterr().out.endswith("Uploaded to https://huggingface.co/me/student\n")


def test_a_file_keeps_its_name(hub: type[Hub], tmp_path: Path) -> None:
    push(tmp_path / "lora.safetensors", "--push-to-hub", "me/student")
    assert hub.asked[1][1]["path_in_repo"] == "lora.safetensors"


def test_without_the_option_nothing_is_uploaded(hub: type[Hub], tmp_path: Path) -> None:
    push(tmp_path / "student")
    assert hub.asked == []


def refused(capsys: pytest.CaptureFixture[str], output: Path, *more: str) -> str:
    with pytest.raises(SystemExit) as end:
        push(output, *more)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_found_before_anything_is_written(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "student"
    assert refused(capsys, output, "--public").startswith("error: --public: has no effect alone")
    assert refused(capsys, output, "--push-to-hub", "student").startswith(
        "error: --push-to-hub: 'student' is not OWNER"
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    said = refused(capsys, output, "--push-to-hub", "me/student")
    assert said == "error: --push-to-hub: there is no token of the hub; set HF_TOKEN, or run `hf auth login`\n"
    assert not output.exists()


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_export_stays(
    hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "error", RuntimeError("no route to host\nmore"))
    said = refused(capsys, tmp_path / "student", "--push-to-hub", "me/student")
    assert said == (
        f"error: --push-to-hub: me/student was not uploaded (no route to host); {tmp_path}/student is written\n"
    )
