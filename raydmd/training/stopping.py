"""Stopping a run from outside: signals become a file that workers and driver heed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from raydmd.errors import STOPPED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import FrameType

    from ray.train.torch import TorchTrainer

    from raydmd.serving.pool import Pool


def leave_on_signals() -> None:
    """End at once on the first SIGINT, until :func:`stop_on_signals` heeds it: nothing is under way yet.

    Python's own exception for it gets lost where a library that is being imported, or Ray as it starts, catches all.
    """

    def leave(number: int, _: FrameType | None) -> None:
        del number
        os.write(2, b"stopped: interrupted before anything began\n")
        os._exit(STOPPED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, leave)


@contextlib.contextmanager
def stop_on_signals(stop: Path) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into the file ``stop``, which the run heeds; the second ends at once."""

    def ask(number: int, _: FrameType | None) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()
        print("\nstopping where it can go on from; once more to end at once", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(trainer: TorchTrainer, pools: Sequence[Pool], meanwhile: Callable[[], None]) -> None:
    """Run the trainer in a thread of its own: in the main one Ray takes Ctrl-C for itself and aborts the run.

    Args:
        trainer: to be run.
        pools: that load meanwhile.
        meanwhile: is called every second.

    Raises:
        PoolError: if a pool does not load; the caller ends what the trainer has started.
    """
    done: Future[None] = Future()

    def work() -> None:
        try:
            trainer.fit()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="raydmd-fit", daemon=True).start()
    while not wait([done], timeout=1.0).done:  # signals are heeded in between
        for pool in pools:
            pool.loaded(enough=1)  # training goes on with what there is
        meanwhile()
    done.result()
