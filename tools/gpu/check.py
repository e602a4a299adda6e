"""Measure rows in a separate process within a time budget. This module imports no torch."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from gpu import worker
from gpu.plan import FAILED, LEFT_OUT, MistakeError, Result, Row

GRACE = 30.0
"""Seconds that a row may take in addition to three times its expected seconds."""
PATIENCE = 600.0
"""Seconds within which a process must have imported everything, and a row of the rehearsal must end."""


class Worker:
    """A process that measures rows one after the other.

    Raises:
        MistakeError: nothing can be measured here.
        RuntimeError: the process ends or does not answer.
    """

    def __init__(self, options: worker.Options):
        spawn = multiprocessing.get_context("spawn")
        self.connection, other = spawn.Pipe()
        self.process = spawn.Process(target=worker.main, args=(other, options), daemon=True)
        self.process.start()
        other.close()
        try:
            found = self._answer(PATIENCE)
        except RuntimeError:
            self.end()
            raise
        if isinstance(found, worker.Mistake):
            self.end()
            raise MistakeError(found.text)
        self.environment: dict[str, Any] = found

    def measure(self, row: Row, limit: float) -> worker.Answer:
        """Return the row's result; a failure if the process ends or does not answer within `limit` seconds."""
        start = time.monotonic()
        try:
            self.connection.send(row)
            return self._answer(limit)
        except (RuntimeError, OSError) as error:
            result = Result(row.name, FAILED, str(error), time.monotonic() - start)
            return worker.Answer(result, sound=False)

    def _answer(self, limit: float) -> Any:
        if not self.connection.poll(limit):
            raise RuntimeError(f"no answer within {limit:.0f} s")
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join(10)
            raise RuntimeError(f"its process ended with code {self.process.exitcode}") from None

    def end(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        with suppress(OSError):
            self.connection.send(None)
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def check(
    rows: Sequence[Row],
    options: worker.Options,
    left: Callable[[], float],
    tell: Callable[[list[Result], dict[str, Any]], object],
) -> list[Result]:
    """Measure rows in their order; leave out a row that does not fit into the rest of the budget.

    Args:
        left: returns the remaining seconds of the budget.
        tell: called after every row with the results so far and their environment.

    Raises:
        MistakeError: nothing can be measured here.
    """
    results: list[Result] = []
    current: Worker | None = None
    environment: dict[str, Any] = {}
    try:
        for row in rows:
            expected = row.expected(options.tiny)
            if left() < expected:
                reason = f"{expected:.0f} s expected, {max(0.0, left()):.0f} s of the budget left"
                results.append(Result(row.name, LEFT_OUT, reason))
                tell(results, environment)
                continue
            try:
                current = current or Worker(options)
                environment = environment or current.environment
                answer = current.measure(row, PATIENCE if options.tiny else 3 * expected + GRACE)
            except RuntimeError as error:
                answer = worker.Answer(Result(row.name, FAILED, f"before it began: {error}"), sound=False)
            results.append(answer.result)
            if current is not None and not answer.sound:
                current.end()
                current = None
            tell(results, environment)
    finally:
        if current is not None:
            current.end()
    return results
