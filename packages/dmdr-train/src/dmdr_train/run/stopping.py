"""What ends a run before its last step: numbers that are not finite, a reward that fails, an alarm, a signal."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from dmdr_train.base.errors import StoppedError
from dmdr_train.base.exit_codes import EARLY_WARNING, NOT_FINITE, STOPPED, UNANSWERED
from dmdr_train.distributed.collectives import agreed, said_anywhere
from dmdr_train.distributed.signals import Signals
from dmdr_train.monitoring import rules
from dmdr_train.monitoring.measures import Watch
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.milestones import Results
from dmdr_train.run.saving import Checkpoints
from dmdr_train.training.trainer import Trainer

GOES_ON = {
    STOPPED: "; start again with run.resume=auto to go on",
    UNANSWERED: "; start again with run.resume=auto to go on when it can be asked",
}


class Stopping:
    """Finds reasons to end a run, and ends it at a checkpoint; every process calls every method."""

    def __init__(
        self,
        settings: Recipe,
        trainer: Trainer,
        results: Results,
        checkpoints: Checkpoints,
        watch: Watch | None,
        signals: Signals,
    ) -> None:
        self.settings = settings
        self.trainer = trainer
        self.results = results
        self.checkpoints = checkpoints
        self.watch = watch
        self.signals = signals

    def ending(self, skipped: int, history: Sequence[rules.Row] | None) -> tuple[int, str] | None:
        """Why the run is to end after this step, as an exit code and its line; all processes agree.

        Args:
            skipped: steps in a row that were.
            history: what rules look back on, if this step was one to look at the student.
        """
        alarm = None if history is None else self.judge(history)
        failure = self.failure()
        if skipped == self.settings.run.max_skipped:
            return NOT_FINITE, self.diagnosis(skipped)
        if failure:
            return UNANSWERED, failure
        if alarm:
            return EARLY_WARNING, alarm
        return self.signalled()

    def stop(self, code: int, line: str) -> None:
        """End the run here, at its last checkpoint; early warning leaves a report of what there is.

        Raises:
            StoppedError: always.
        """
        newest = self.checkpoints.newest
        assert newest
        if code == EARLY_WARNING:
            self.results.report(newest)
        raise StoppedError(code, f"{line}; saved in {newest}{GOES_ON.get(code, '')}")

    def signalled(self) -> tuple[int, str] | None:
        """Whether a signal has reached any of the processes."""
        received = said_anywhere(self.signals.received or "")
        return (STOPPED, f"by {received}") if received else None

    def heed_signals(self) -> None:
        """End the run here, between two steps, if there is a signal.

        Raises:
            StoppedError: in this case.
        """
        if signalled := self.signalled():
            self.checkpoints.finish()
            if self.checkpoints.step != self.trainer.step:
                self.checkpoints.save(needed=True)
            self.stop(*signalled)

    def failure(self) -> str:
        """What a reward has failed with, on any process; empty if none has."""
        asking: list[Any] = [*self.trainer.objectives, self.watch, self.results.evaluator]
        return said_anywhere(next((each.failure for each in asking if each and each.failure), ""))

    def diagnosis(self, count: int) -> str:
        """What was not finite in the last step, on any process, and for which prompts."""
        found: list[Any] = [None] * self.trainer.world
        dist.all_gather_object(found, self.trainer.trouble)
        prompts: dict[str, list[Any]] = {}
        for name, drawn in itertools.chain.from_iterable(found):
            prompts.setdefault(name, []).extend(drawn)
        named = "; ".join(f"{name} for {', '.join(map(repr, drawn[:4]))}" for name, drawn in prompts.items())
        return (
            f"{count} steps in a row were skipped, since a loss or gradient was not finite: "
            f"{named or 'the gradient of a network, from finite losses'}"
        )

    def judge(self, history: Sequence[rules.Row]) -> str | None:
        """Say which rules hold; the line of one that stops the run, on which all processes agree."""

        def stopping() -> str | None:
            tracker = self.results.tracker
            assert tracker
            alarms = rules.judge(self.settings.rules, rules.evaluations(history))
            for alarm in alarms:
                tracker.warn(alarm.step, str(alarm))
            return next((str(alarm) for alarm in reversed(alarms) if alarm.rule.action == "stop"), None)

        return agreed(stopping)
