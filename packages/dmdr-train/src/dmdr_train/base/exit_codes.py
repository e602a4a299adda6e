"""The exit codes of a run that ends early, which tell a scheduler what to do.

| code | meaning |
|---|---|
| 2 | a mistake in the recipe, an option or a file; the line names key, value and fix |
| 4 | a rule of `watch` with `action: stop` held; the state is saved |
| 65 | losses or gradients were not finite `run.max_skipped` times in a row; the state before these steps is saved |
| 69 | another process of the run ended or did not answer for `run.timeout`; start again from the last checkpoint |
| 74 | a checkpoint could not be written, and it was the last one or `run.on_failed_save` is `stop` |
| 75 | stopped by a signal; the state is saved; start again to resume |
| 76 | a reward failed, such as an endpoint that does not answer; the state is saved |

The codes from 65 on are BSD's sysexits: EX_DATAERR, EX_UNAVAILABLE, EX_IOERR, EX_TEMPFAIL, EX_PROTOCOL.
"""

EXIT_CODE = 2
EARLY_WARNING, NOT_FINITE, LOST, NOT_SAVED, STOPPED, UNANSWERED = 4, 65, 69, 74, 75, 76
