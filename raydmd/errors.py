"""Errors a user can meet, each with the exit code of the process it ends.

Exit codes: 0 done; 1 failed; 2 bad input, nothing was started; 3 stopped, the same command resumes.
"""

from __future__ import annotations

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3


class RaydmdError(Exception):
    """Something went wrong and the message says what, where and what to do."""

    exit_code = FAILED


class InputError(RaydmdError):
    """What the user gave can't be run; nothing was started."""

    exit_code = BAD_INPUT


class RunStopped(RaydmdError):
    """The run was asked to stop, wrote a checkpoint, and can be resumed by the same command."""

    exit_code = STOPPED


class RunFailed(RaydmdError):
    """The run failed after its retries; what was computed is kept."""


class DamagedCheckpoint(RunFailed):
    """A checkpoint is not what was written; the run goes on from the one before."""


class NonFiniteError(RaydmdError):
    """A loss, gradient, score or reward is not finite; the optimizers did not move.

    Attributes:
        samples: of the request that are the cause, by their place in it; none if that is not known.
    """

    def __init__(self, message: str, samples: tuple[int, ...] = ()) -> None:
        """Say what is not finite.

        Args:
            message: in words.
            samples: see above.
        """
        super().__init__(message)
        self.samples = samples


class RewardError(RaydmdError):
    """A reward broke its contract, e.g. another number of values than samples; names the reward."""


class PoolError(RaydmdError):
    """A pool could not answer; names pool, replica and request."""


class ScoreTimeout(PoolError):
    """A request outlived its deadline."""


class PoolExhausted(PoolError):
    """No replica of the pool is healthy, or a request used up its retries."""
