"""Reports: built by name, read from records of other versions, shown in one line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from fastedit.records.edit import EditSet, Problem
from fastedit.runs.reports import BatchRejected, BatchReport, Run
from fastedit.runtime.hashing import canonical

REPORT = BatchReport(
    batch=2,
    case_ids=(4, "five"),
    seconds=0.25,
    loss=float("nan"),
    steps=3.0,
    written=(2, 1),
    neurons={3: 192},
    norms={3: 0.5},
    token_budget=768,
    notes=("slow",),
    measured={"growth": float("inf")},
)


def test_a_report_comes_back_from_its_record() -> None:
    read = BatchReport.from_record(json.loads(canonical(asdict(REPORT))))
    assert read.loss is not None
    assert math.isnan(read.loss)
    assert replace(read, loss=None) == replace(REPORT, loss=None)


def test_a_report_of_another_version_is_read() -> None:
    older = {"batch": 1, "case_ids": [1], "seconds": 0.5}
    assert BatchReport.from_record(older) == BatchReport(batch=1, case_ids=(1,), seconds=0.5)
    assert BatchReport.from_record({**older, "energy": 7}) == BatchReport.from_record(older)


def test_reports_are_built_by_name() -> None:
    with pytest.raises(TypeError):
        BatchReport(1, (1,), 0.5)  # type: ignore[misc]


def test_a_run_is_shown_in_one_line(tiny_facts: EditSet) -> None:
    rejected = replace(REPORT, error="too much")
    assert repr(Run(tiny_facts[:4], (REPORT, REPORT))) == "Run(4 edits, 2 batches, 0.5 s)"
    skipped = Run(tiny_facts[:2], (REPORT, rejected), (Problem("is empty"),))
    assert repr(skipped) == "Run(2 edits, 2 batches, 1 rejected, 1 problem, 0.5 s)"


def test_a_rejected_batch_names_few_edits() -> None:
    error = BatchRejected(3, list(range(9)), "not finite")
    assert str(error) == "batch 3 rolled back, no weight changed: not finite (case ids 0, 1, 2, 3, 4, ...)"
    assert error.case_ids == list(range(9))
