"""Looks at the edits after the last batch: which of them took?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastedit.evaluation.answers import answer
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit
from fastedit.runs.reports import BatchReport, Missed
from fastedit.runtime.progress import Show, track


def missed_edits(
    model: ModelAdapter, edits: Sequence[Edit], reports: Iterable[BatchReport], show: Show
) -> tuple[Missed, ...]:
    """The edits that did not take, in one pass over all of them.

    An edit took when every token of its target ranks first after the bare prompt, under teacher forcing. Of several
    edits of one prompt and subject only the last can take: the earlier ones are left out.
    reports: of the batches, which say for which edits nothing was written"""
    unwritten = {case_id for report in reports for case_id in report.unwritten}
    latest = list({(edit.prompt, edit.subject): edit for edit in edits}.values())

    with track(len(latest), "looking at the edits", "edits", show) as advance:
        answers = answer(model, [(edit.prompt, edit.target_new, edit.join) for edit in latest], advance)

    return tuple(
        Missed(
            case_id=edit.case_id,
            prompt=edit.prompt,
            wanted=edit.target_new,
            got=model.tokenizer.decode(list(scored.best)).strip(),
            written=edit.case_id not in unwritten,
        )
        for edit, scored in zip(latest, answers, strict=True)
        if not scored.exact
    )
