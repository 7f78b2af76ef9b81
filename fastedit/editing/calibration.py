"""Derived settings tried before the first edit: a few facts that the model knows are edited, asked again, and undone.

The result is kept in the cache by the content of the model, the method and its settings, so a model is tried once.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastedit.config import MomentConfig
from fastedit.editing.guard import Guard, GuardTripped
from fastedit.editing.stream import Stream
from fastedit.evaluation.answers import Answer, agreement, answer, perplexity
from fastedit.methods.closed_form.solver import NotPositiveDefinite
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.records.edit import Edit, EditSet
from fastedit.records.shipped import usable_facts
from fastedit.runs.identity import identity
from fastedit.runtime.cache import cache_folder, load_json, store_json
from fastedit.runtime.hashing import canonical
from fastedit.runtime.interrupts import Interrupts
from fastedit.runtime.progress import track
from fastedit.runtime.words import counted, told_by
from fastedit.weights.apply import RejectedUpdate

log = logging.getLogger(__name__)

FORMAT = "fastedit calibration 1"
FOLDER = "calibrations"
N_FACTS = 8
# Facts that a closed form writes together; a large model has time for the first of two batches only.
BATCH = 4
# Fewer say nothing about the settings.
FEWEST_FACTS = 4
# Mean probability of the tokens of an answer that a model gives with confidence.
SURE = 0.3
TIME_LIMIT_S = 120.0
# Of the model's own text, whose perplexity is measured.
TEXT = MomentConfig(tokens=512, window=64)
LEAST_EFFICACY = 0.7
LARGEST_PERPLEXITY = 1.25


class CalibrationFailed(ValueError):
    """The derived settings were tried on this model, and the edits did not take or damaged it."""


@dataclass(frozen=True)
class CheckedFact:
    """One fact that was edited on trial.

    said: what the model answers, surely; wanted: what the edit was to make it say; says: what it said then
    took: whether it said what was wanted; reworded: the same, asked in other words
    neighbour: share of the tokens of a neighbour's answer that stayed
    """

    prompt: str
    said: str
    wanted: str
    says: str
    took: bool
    reworded: bool
    neighbour: float

    def __str__(self) -> str:
        return f"{self.prompt!r}: was {self.said!r}, wanted {self.wanted!r}, is {self.says!r}"


@dataclass(frozen=True)
class Calibration:
    """What became of a few facts edited with derived settings, four by four, or as many as the method
    writes together, each time on the unedited model.

    facts: empty where nothing was tried
    perplexity: of text that the unedited model wrote, edited over unedited, the mean of all trials; None where it was
        not measured
    seconds: that it took, without second moments
    unchecked: why nothing was tried; None where the facts were tried
    error: why the batch could not be written; None where it was
    """

    facts: tuple[CheckedFact, ...] = ()
    perplexity: float | None = None
    seconds: float = 0.0
    unchecked: str | None = None
    error: str | None = None

    @property
    def efficacy(self) -> float:
        """Share of the facts whose edit took; NaN without facts."""
        return _mean([fact.took for fact in self.facts])

    @property
    def generalization(self) -> float:
        """Share of the facts that are said in answer to other words; NaN without facts."""
        return _mean([fact.reworded for fact in self.facts])

    @property
    def locality(self) -> float:
        """Share of the tokens of neighbours' answers that stayed; NaN without facts."""
        return _mean([fact.neighbour for fact in self.facts])

    @property
    def failed(self) -> bool:
        """Whether the settings were tried and are not fit for use."""
        if self.unchecked is not None:
            return False

        # Negated, so that a perplexity that is not a number fails.
        whole = self.perplexity is not None and self.perplexity <= LARGEST_PERPLEXITY
        return self.error is not None or self.efficacy < LEAST_EFFICACY or not whole

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the three shares."""
        shares = {"efficacy": self.efficacy, "generalization": self.generalization, "locality": self.locality}
        return {**asdict(self), **{name: None if math.isnan(share) else share for name, share in shares.items()}}

    def __str__(self) -> str:
        if self.unchecked is not None:
            return f"unchecked: {self.unchecked}"
        if self.error is not None:
            return f"checked on {counted(len(self.facts), 'fact')}: {self.error}"

        return (
            f"checked on {counted(len(self.facts), 'fact')} in {self.seconds:.0f} s: efficacy {self.efficacy:.2f},"
            f" generalization {self.generalization:.2f}, neighbours unchanged {self.locality:.2f},"
            f" perplexity {self.perplexity:.3f} times the unedited"
        )


class _OutOfTime(Exception):
    """The check took too long."""


@dataclass(frozen=True)
class _Watchman:
    """Stops the check where it takes too long or Ctrl-C was pressed.

    ends: in seconds of the monotonic clock; advance: of the progress bar
    """

    ends: float
    interrupts: Interrupts
    advance: Callable[[float], None]

    def __call__(self, n_finished: float) -> None:
        self.advance(n_finished)

        if self.interrupts.stop_requested:
            raise KeyboardInterrupt
        if time.monotonic() > self.ends:
            raise _OutOfTime


class _Looks(NamedTuple):
    """What a model answers: the new answers, on the prompt and in other words, and those of neighbours."""

    answers: list[Answer]
    reworded: list[Answer]
    neighbours: list[Answer]


def calibrate(stream: Stream, again: bool = False, time_limit_s: float = TIME_LIMIT_S) -> Calibration:
    """Try the settings of an editor on a few facts; model and editor are as before, bit for bit.

    again: also where the cache holds the result
    time_limit_s: of the check, without second moments; beyond it the settings are unchecked
    Raises ValueError where edits are in force, since the result is kept for the unedited model; KeyboardInterrupt after
    a Ctrl-C; and what preparing the method's state raises."""
    if stream.committed:
        batches = counted(len(stream.committed), "batch is", "batches are")
        raise ValueError(f"calibrate: wanted the unedited model, but {batches} in force; take them back first")

    # A method of the user's own may change under its name.
    path = _path(stream) if stream.method.name in METHODS else None
    kept = None if path is None or again else _kept(path)
    if kept is not None:
        return kept

    _ = stream.state
    started = time.monotonic()
    try:
        found = _check(stream, started + time_limit_s)
    except _OutOfTime:
        found = Calibration(unchecked=f"it takes more than {time_limit_s:.0f} s on this machine")

    found = replace(found, seconds=time.monotonic() - started)
    if path is not None:
        store_json(path, {"format": FORMAT, "calibration": asdict(found)})
    return found


def _check(stream: Stream, ends: float) -> Calibration:
    """`calibrate`, afresh. ends: in seconds of the monotonic clock"""
    facts = known_facts(stream)
    if len(facts) < FEWEST_FACTS:
        known = counted(len(facts), "shipped fact")
        return Calibration(unchecked=f"the model surely knows {known}, and {FEWEST_FACTS} are needed")

    text = _own_text(stream)
    if not text.strip():
        return Calibration(unchecked="the model writes no text whose perplexity could be measured")

    with (
        Interrupts() as interrupts,
        track(len(facts), "trying the derived settings", "facts", stream.progress) as advance,
    ):
        trials = _Trials(stream, text, _Watchman(ends, interrupts, advance))
        rows: list[CheckedFact] = []
        growths: list[float] = []
        for batch in _batches(stream, facts):
            if rows and not trials.have_time_for_another:
                break
            try:
                found, growth = trials.one(batch)
            except (RejectedUpdate, NotPositiveDefinite, GuardTripped) as error:
                return Calibration(tuple(rows), None, error=str(error))
            except _OutOfTime:
                if not rows:
                    raise
                break
            rows += found
            growths.append(growth)

    return Calibration(tuple(rows), sum(growths) / len(growths))


def _batches(stream: Stream, facts: Sequence[Edit]) -> list[Sequence[Edit]]:
    """The facts as they are tried together, in batches no larger than the method's."""
    size = min(stream.method.batch_size, BATCH)
    return [facts[start : start + size] for start in range(0, len(facts), size)]


class _Trials:
    """Batches of facts that are written, looked at, and undone, each on the model as it was.

    text: whose perplexity is measured
    Raises _OutOfTime."""

    def __init__(self, stream: Stream, text: str, watchman: _Watchman) -> None:
        self.stream = stream
        self.watchman = watchman
        self.text = text
        self.guard = Guard()
        self.guard.begin(stream.adapter, stream.weights)
        watchman(0)
        self.unedited = perplexity(stream.adapter, self.text, show=False)
        self._longest = 0.0

    @property
    def have_time_for_another(self) -> bool:
        """Whether the time that is left is that of the longest trial so far."""
        return time.monotonic() + self._longest <= self.watchman.ends

    def one(self, facts: Sequence[Edit]) -> tuple[tuple[CheckedFact, ...], float]:
        """What became of the facts, and the perplexity of the text, edited over unedited.

        Raises _OutOfTime, and what `Stream.write_batch` raises."""
        stream, model, started = self.stream, self.stream.adapter, time.monotonic()
        before = _look(model, facts)
        self.watchman(0)

        with stream.temporarily():
            stream.write_batch(0, EditSet(tuple(facts)), self.guard, self.watchman)
            after, edited = _look(model, facts), perplexity(model, self.text, show=False)

        self._longest = max(self._longest, time.monotonic() - started)
        return _rows(model, facts, before, after), edited / self.unedited


def known_facts(stream: Stream) -> Sequence[Edit]:
    """The shipped facts whose true answer the model gives with confidence, the surest first, at most N_FACTS."""
    model = stream.adapter
    facts = usable_facts(
        tokenizer=model.tokenizer,
        max_positions=model.max_positions,
        template_tokens=stream.method.template_tokens(stream.config),
        n_embeddings=model.n_embeddings,
        needs_subject=stream.method.needs_subject,
    )
    answers = answer(model, [(edit.prompt, str(edit.target_true), edit.join) for edit in facts])
    sure = [at for at, given in enumerate(answers) if given.exact and given.log_prob >= math.log(SURE)]
    sure.sort(key=lambda at: -answers[at].log_prob)
    return [facts[at] for at in sure[:N_FACTS]]


def _look(model: ModelAdapter, facts: Sequence[Edit]) -> _Looks:
    """Ask about the facts."""
    answers = answer(model, [(edit.prompt, edit.target_new, edit.join) for edit in facts])
    reworded = answer(model, [(edit.rephrase_prompts[0], edit.target_new, edit.join) for edit in facts])
    probes = [edit.locality[0] for edit in facts]
    return _Looks(answers, reworded, answer(model, [(probe.prompt, probe.answers[0]) for probe in probes]))


def _rows(model: ModelAdapter, facts: Sequence[Edit], before: _Looks, after: _Looks) -> tuple[CheckedFact, ...]:
    """What became of each fact."""
    rows = []
    for at, edit in enumerate(facts):
        took, said = after.answers[at], after.neighbours[at]
        rows.append(
            CheckedFact(
                prompt=edit.prompt,
                said=str(edit.target_true),
                wanted=edit.target_new,
                says=model.tokenizer.decode(list(took.best)).strip(),
                took=took.exact,
                reworded=after.reworded[at].exact,
                neighbour=agreement(before.neighbours[at].best, said.best),
            )
        )
    return tuple(rows)


def _own_text(stream: Stream) -> str:
    """Text that the model writes; "" for what is shorter than two tokens."""
    tokenizer = stream.adapter.tokenizer
    windows = Source(seed=stream.seed).windows(stream.adapter, TEXT, show=False)
    text = "\n".join(tokenizer.batch_decode(windows, skip_special_tokens=True))

    return text if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1 else ""


def table(calibration: Calibration) -> str:
    """One line for each fact that was tried, and one with the means."""
    return "\n".join([*map(str, calibration.facts), str(calibration)])


def _path(stream: Stream) -> Path:
    """The file of the result, named by all that it depends on."""
    about = identity(stream.adapter, stream.weights)
    del about["source"]
    about |= {"format": FORMAT, "method": stream.method.name, "config": stream.config.model_dump(mode="json")}
    about |= {"seed": stream.seed, "state": stream.state.describe()}

    return cache_folder() / FOLDER / f"{hashlib.sha256(canonical(about).encode()).hexdigest()[:32]}.json"


def _kept(path: Path) -> Calibration | None:
    """The result in a file; None where there is none, and, with a warning, where it holds something else."""
    data = load_json(path)
    if data is None:
        return None

    try:
        plain = data["calibration"] if data["format"] == FORMAT else {}
        return Calibration(**{**plain, "facts": tuple(CheckedFact(**fact) for fact in plain["facts"])})
    except (KeyError, TypeError) as error:
        log.warning("%s: holds no calibration (%s); it is made again", path, told_by(error))
        return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
