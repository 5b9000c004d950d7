"""Cases several at a time, by threads: what takes long in files and arrays lets go of Python's lock."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int | None = None
) -> Generator[Result, None, None]:
    """``work(item)`` of each item, in their order; ``threads`` are worked on at a time, 0: each when asked for.

    At most ``ahead`` are begun beyond the one that is taken; None sets no limit, for results that are small. The first
    item whose work fails raises its error, and those not yet begun are left.
    """
    if not threads:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if ahead is not None and len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def behind(threads: int) -> Iterator[Callable[..., None]]:
    """A function ``begin(work, *arguments)`` that leaves work to ``threads``; with 0 it does the work itself.

    It waits while as many are unfinished. An error of the work is raised by a later call, or where the block ends,
    which waits for all.
    """
    if not threads:
        yield lambda work, *arguments: work(*arguments)
        return
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def begin(work: Callable[..., Any], *arguments: Any) -> None:
            if len(waiting) == threads:
                waiting.popleft().result()
            waiting.append(pool.submit(work, *arguments))

        yield begin
        for one in waiting:
            one.result()
