"""Faults that one of two processes meets: broken numbers, and rewards, endpoints and trackers that fail."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from dmdr_train.checkpoint.find import checkpoints_in
from dmdr_train.checkpoint.manifest import verify

# A package with a reward. It fails on the last process, at the updates that a file in the working directory names.
MOODY = """
import json, os, signal, time
from pathlib import Path
from dmdr_rewards import RewardInfo

class Moody:
    info = RewardInfo("moody", "", (0.0, 1.0), "", "none", "none", True, None, "")
    def __init__(self, device, dtype):
        self.skipped = self.update = 0
    def score(self, images, prompts):
        scores = images.flatten(1).mean(dim=1)
        if not images.requires_grad:
            return scores
        self.update += 1
        moods = Path("moods.json")
        last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        mood = json.loads(moods.read_text()).get(str(self.update)) if last and moods.exists() else None
        if mood == "down":
            raise ConnectionError("nobody answers")
        if mood == "gradient":
            images.register_hook(lambda gradient: gradient * float("nan"))
        if mood == "killed":
            for pause in (1.5, 600):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(pause)
        if mood == "skip":
            self.skipped += len(images)
        return scores * {"skip": float("nan"), "nan": float("nan"), "inf": float("-inf")}.get(mood, 1.0)
"""
# A tracker whose server disappears.
WANDB = """
class Error(Exception):
    pass

def Image(picture, caption=None):
    return picture

class Run:
    def log(self, values, step=None):
        raise ConnectionError("no route to the tracker")
    def finish(self):
        pass

def init(**options):
    return Run()
"""


@pytest.fixture
def packages(tmp_path: Path) -> str:
    """Install the reward and the tracker in a folder."""
    folder = tmp_path / "site"
    (folder / "moody-1.dist-info").mkdir(parents=True)
    (folder / "moody-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1\n")
    (folder / "moody-1.dist-info/entry_points.txt").write_text("[dmdr_rewards]\nmoody = moody:Moody\n")
    (folder / "moody.py").write_text(MOODY)
    (folder / "wandb.py").write_text(WANDB)
    return str(folder)


@pytest.fixture
def moody(workshop: Any, packages: str) -> Callable[..., Any]:
    """Run with a reward that has these moods: `moody({2: "nan"}, "run.steps=4")`."""
    workshop.recipe |= {
        "objectives": [
            {"kind": "distribution_matching"},
            {"kind": "refl", "weight": 0.1, "reward": {"name": "moody"}},
        ],
        "guidance": {"ratio": 1},
        "run": {"output": "out", "steps": 8, "checkpoint_every": 3, "keep_last": 9, "resume": "auto"},
        "watch": {"every": 0},
    }
    workshop.recipe["optim"]["accumulation"] = 1

    def run(moods: dict[int, str], *arguments: str, processes: int = 2) -> Any:
        (workshop.folder / "moods.json").write_text(json.dumps(moods))
        return workshop.run(*arguments, processes=processes, PYTHONPATH=packages)

    return run


def stops(outcome: Any) -> list[str]:
    return [line for line in outcome.stderr.splitlines() if line.startswith("stopped: ")]


def test_rewards_and_trackers_that_fail(
    moody: Callable[..., Any], workshop: Any, read_rows: Callable[[Path], list[dict[str, float]]]
) -> None:
    """Both processes skip updates with a NaN score or gradient; a picture without a score is left out; a reward that
    fails ends the run, which resumes when the reward works again."""
    out = workshop.folder / "out"
    out.mkdir()
    (out / "tensorboard").write_text("in the way")
    failed = moody({2: "nan", 3: "inf", 4: "gradient", 5: "skip", 7: "down"}, "tracking.wandb=project")
    assert failed.codes == [76, 76], failed.stderr
    last = out / "checkpoints/step-00000007"
    assert stops(failed) == [
        f"stopped: moody of the objective refl: nobody answers; saved in {last.relative_to(workshop.folder)}; "
        "start again with run.resume=auto to go on when it can be asked"
    ]
    verify("run.resume", last)
    assert "Traceback" not in failed.stderr
    for name, reason in (("tensorboard", "File exists"), ("wandb", "no route to the tracker")):
        (said,) = [line for line in failed.stdout.splitlines() if f"warning: tracking.{name} failed" in line]
        assert reason in said

    rows = read_rows(out)
    assert [row["skipped/generator"] for row in rows] == [0, 1, 2, 3, 3, 3, 4]
    assert [row["unscored/refl"] for row in rows] == [0, 0, 0, 0, 0.5, 0, 0]
    assert [math.isfinite(row["loss/refl"]) for row in rows] == [n not in (2, 3, 7) for n in range(1, 8)]
    assert {row["skipped/fake_score"] for row in rows} == {0}

    assert moody({}, "tracking.wandb=project").codes == [0, 0]
    assert len(read_rows(out)) == 8


def test_numbers_that_stay_broken_end_the_run_with_a_diagnosis(moody: Callable[..., Any], workshop: Any) -> None:
    failed = moody(dict.fromkeys(range(3, 9), "nan"), "run.max_skipped=3")
    assert failed.codes == [65, 65], failed.stderr
    (line,) = stops(failed)
    assert line.startswith("stopped: 3 steps in a row were skipped, since a loss or gradient was not finite: refl for ")
    assert line.endswith("; saved in out/checkpoints/step-00000005")
    for path in checkpoints_in(workshop.folder / "out/checkpoints"):
        verify("run.resume", path)


def test_a_second_signal_in_a_step_that_never_ends(
    moody: Callable[..., Any], workshop: Any, read_rows: Callable[[Path], list[dict[str, float]]]
) -> None:
    """A second signal ends the process at once; the saved checkpoint is complete, and the run resumes from it."""
    ended = moody({5: "killed"}, processes=1)
    assert ended.codes == [128 + signal.SIGTERM], ended.stderr
    assert "a second signal: process" in ended.stderr
    (checkpoint,) = checkpoints_in(workshop.folder / "out/checkpoints")
    verify("run.resume", checkpoint)
    assert f"resuming from out/checkpoints/{checkpoint.name}" in moody({}, processes=1).check().stderr
    assert len(read_rows(workshop.folder / "out")) == 8


# -- a judge behind an endpoint


class Judge(ThreadingHTTPServer):
    """Fails for the second prompt only, at the checks whose numbers are given."""

    daemon_threads = True

    def __init__(self, out: Path, troubles: dict[int, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.metrics, self.troubles = out / "metrics.jsonl", troubles

    @property
    def trouble(self) -> str | None:
        looks = self.metrics.read_text().count("\n") if self.metrics.exists() else 0
        return self.troubles.get(looks + 1)


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        trouble = self.server.trouble if "a dog in a hat" in asked else None
        if trouble == "slow":
            time.sleep(1)
            return
        answer = {"choices": [{"message": {"content": "7"}}]}
        content = b"<html>" if trouble == "garbage" else json.dumps(answer).encode()
        self.send_response(503 if trouble == "down" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judged(
    make_workshop: Callable[..., Any], write_texts: Callable[[Path], None], tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Run a tiny SD3 with a held-out judge that has these troubles; each process scores one of two prompts."""
    from dmdr_models import tiny

    tiny.sd3(tmp_path / "sd3")
    write_texts(tmp_path)
    judge = Judge(tmp_path / "out", {})
    threading.Thread(target=judge.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    lora = {"rank": 2, "alpha": 2}
    options = {"url": f"http://127.0.0.1:{judge.server_port}/v1", "timeout": 0.5, "retries": 1, "backoff": 0.01}
    recipe: dict[str, Any] = {
        "model": {"family": "sd3", "path": "sd3", "max_tokens": 8, "generator_lora": lora, "fake_score_lora": lora},
        "data": {"prompts": "prompts.txt"},
        "objectives": [{"kind": "distribution_matching"}],
        "guidance": {"ratio": 1},
        "optim": {"batch_size": 2, "generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "run": {"output": "out", "steps": 5, "resume": "auto"},
        "tracking": {"log_every": 1, "tensorboard": False, "samples": {"prompts": ["a cat", "a dog in a hat"]}},
        "watch": {
            "every": 1,
            "prompts": 2,
            "pictures": 2,
            "rewards": [{"name": "vlm-judge", "checkpoint": "a model", "options": options}],
        },
    }
    workshop = make_workshop(tmp_path, recipe)

    def run(troubles: dict[int, str], on_failure: str) -> Any:
        judge.troubles = troubles
        options["on_failure"] = on_failure
        return workshop.run(processes=2)

    yield run
    judge.shutdown()


TROUBLES = {2: "down", 3: "garbage", 4: "slow"}


def test_a_judge_is_skipped(judged: Callable[..., Any], tmp_path: Path, read_rows: Any) -> None:
    """Pictures without a score are not in the mean."""
    done = judged(TROUBLES, "skip").check()
    assert [row["watch/held_out/vlm-judge"] for row in read_rows(tmp_path / "out")] == [7.0] * 5
    for count, reason in ((2, "503"), (4, "not an answer of chat completions"), (6, "timed out")):
        assert f"vlm-judge skipped 1 of 1 pictures, {count} so far" in done.stderr
        assert reason in done.stderr


def test_a_judge_that_is_not_there_is_told_before_the_first_step(judged: Callable[..., Any], tmp_path: Path) -> None:
    failed = judged({1: "down"}, "stop")
    assert failed.codes == [76, 76]
    (line,) = stops(failed)
    assert line.startswith("stopped: watch.rewards.0: http://127.0.0.1:")
    assert line.endswith("; start again when it answers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trouble", sorted(TROUBLES.values()))
def test_a_judge_stops_the_run(judged: Callable[..., Any], tmp_path: Path, read_rows: Any, trouble: str) -> None:
    """Both processes stop although only one got no answer; the run resumes when the judge answers."""
    failed = judged({2: trouble}, "stop")
    assert failed.codes == [76, 76], failed.stderr
    (line,) = stops(failed)
    assert line.startswith("stopped: held_out/vlm-judge of watch: http://127.0.0.1:")
    assert "saved in out/checkpoints/step-00000002; start again with run.resume=auto" in line
    verify("run.resume", tmp_path / "out/checkpoints/step-00000002")
    judged({}, "stop").check()
    scores = [row["watch/held_out/vlm-judge"] for row in read_rows(tmp_path / "out")]
    assert [scores[0], *scores[2:]] == [7.0] * 4
