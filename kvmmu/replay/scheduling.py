"""Work for other threads, processes and computers, by Dask (extra `dask`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvmmu.arch.arguments import check_name
from kvmmu.arch.extras import missing_extra

__all__ = ["LOCAL", "check_scheduler", "computing", "dask"]

LOCAL = ("threads", "processes")


def dask() -> Any:
    """Return the module dask.

    Raises
    ------
    ImportError
        It is not installed; the message names the extra.
    """
    try:
        import dask
    except ImportError as error:
        raise missing_extra("scheduler: needs Dask, which is not installed", "dask") from error
    return dask


def check_scheduler(scheduler: Any) -> str:
    """Return where to compute: "threads", "processes", or the address of a scheduler of Dask, as tcp://host:8786."""
    if not isinstance(scheduler, str):
        raise TypeError(f"scheduler: want 'threads', 'processes' or an address, got {type(scheduler).__name__}")
    if "://" not in scheduler:
        check_name("scheduler", scheduler, LOCAL)
    return scheduler


class _Computing:
    """A scheduler of graphs, for as long as a `computing()` block lasts."""

    def __init__(self, scheduler: str, client: Any) -> None:
        self._scheduler, self._client = scheduler, client

    def all(self, tasks: Sequence[Any]) -> list[Any]:
        """Return the results of delayed calls, in their order."""
        if self._client is not None:
            return list(self._client.gather(self._client.compute(list(tasks))))
        return list(dask().compute(*tasks, scheduler=self._scheduler))


@contextmanager
def computing(scheduler: str) -> Iterator[_Computing]:
    """A block in which delayed calls are computed; a client of a scheduler elsewhere lasts as long."""
    if scheduler in LOCAL:
        dask()
        yield _Computing(scheduler, None)
        return
    dask()
    from distributed import Client

    with Client(scheduler, set_as_default=False) as client:
        yield _Computing(scheduler, client)
