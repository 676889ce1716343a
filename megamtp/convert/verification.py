"""Comparing a source's checksums in other threads, while its tensors are read: hashing releases the interpreter."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from megamtp.convert.base import Check, Source
from megamtp.errors import UserError

READ_BYTES = 1 << 22
THREADS = 2


class Verification:
    """The comparison that is running."""

    def __init__(self, futures: list[Future]):
        self._futures = futures

    def raise_if_failed(self) -> None:
        """``UserError`` where damage is known already."""
        for future in self._futures:
            if future.done():
                future.result()

    def wait(self) -> None:
        """``UserError`` where a file is damaged."""
        for future in self._futures:
            future.result()


@contextmanager
def verifying(source: Source, on_bytes: Callable[[int], None] = lambda n_bytes: None) -> Iterator[Verification]:
    """Compare the source's checksums in threads, which call ``on_bytes``; leaving ends them."""
    stop = Event()

    def compare(check: Check) -> None:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
        with open(check.path, "rb", buffering=0) as file:
            for at, end in ((0, check.without[0]), (check.without[1], check.file_bytes)):
                file.seek(at)
                while at < end and not stop.is_set() and (n := file.readinto(buffer[: end - at])):
                    digest.update(buffer[:n])
                    on_bytes(n)
                    at += n
        if not stop.is_set() and digest.hexdigest() != check.sha256:
            raise UserError(f"{check.path}: damaged, its checksum is wrong; use an earlier checkpoint")

    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(compare, check) for check in source.checks()]
        try:
            yield Verification(futures)
        finally:
            stop.set()
            for future in futures:
                future.cancel()
