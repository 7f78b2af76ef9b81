"""Which warnings are collected."""

from __future__ import annotations

import logging
import threading

from fastedit.runtime.warnings_log import Notes

log = logging.getLogger("fastedit.test")


def test_warnings_of_this_thread_are_collected_once_each() -> None:
    with Notes() as notes:
        log.info("not a warning")
        log.warning("%d neurons left", 3)
        log.error("worse")
        log.warning("3 neurons left")
        logging.getLogger("other").warning("of another library")
        thread = threading.Thread(target=log.warning, args=("from another thread",))
        thread.start()
        thread.join()
    log.warning("after the block")
    assert notes.lines == ["3 neurons left", "worse"]


def test_blocks_may_be_nested() -> None:
    with Notes() as outer:
        log.warning("one")
        with Notes() as inner:
            log.warning("two")
    assert (outer.lines, inner.lines) == (["one", "two"], ["two"])
