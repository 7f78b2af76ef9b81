"""Ctrl-C inside and outside the block."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator

import pytest

from fastedit.runtime.interrupts import Interrupts


@pytest.fixture(autouse=True)
def python_handler() -> Iterator[None]:
    """Python's own handler, which a shell's background job starts without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_requests_a_stop_and_the_second_abandons(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Interrupts() as interrupts:
        interrupts.check()
        assert not interrupts.stop_requested
        signal.raise_signal(signal.SIGINT)
        interrupts.check()
        assert interrupts.stop_requested
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert ["stopping" in caplog.messages[0], "abandoning" in caplog.messages[1]] == [True, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_keeps_a_handler_of_its_own() -> None:
    received: list[int] = []

    def own(number: int, frame: object) -> None:
        received.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert not interrupts.stop_requested
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]


def test_another_thread_installs_no_handler() -> None:
    handlers: list[object] = []

    def work() -> None:
        with Interrupts():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]
