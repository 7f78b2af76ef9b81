"""The rows of `bench/columns.py`, and how they are printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One configuration.

    table, name: where the row is printed
    protocol: "independent", "batch" or "sequential", see `columns.py`
    settings: as `fastedit edit --set` takes them
    start, limit: the records; batch_size: of the sequential protocol
    """

    table: str
    name: str
    method: str
    protocol: str
    settings: tuple[str, ...] = ()
    start: int = 500
    limit: int = 100
    batch_size: int = 10

    @property
    def key(self) -> str:
        """What `--only` is matched with."""
        return f"{self.table}/{self.name}"


REMEDIES = {
    "FiNE": (),
    "FiNE, token=old": ("token=old",),
    "FiNE, common_share=0.02": ("common_share=0.02",),
    "FiNE, token=old, common_share=0.02": ("token=old", "common_share=0.02"),
}

# FiNE's preset, one setting changed at a time.
SWEEP = {
    "the preset": (),
    "2 neurons per token": ("neurons=2",),
    "10 neurons": ("neurons=10",),
    "20 neurons": ("neurons=20",),
    "learning rate .002": ("train.lr=0.002",),
    "learning rate .01": ("train.lr=0.01",),
    "no layer frozen": ("frozen_layers=0",),
    "last 10 layers frozen": ("frozen_layers=10",),
    "gate_only": ("score_activation=gate_only",),
    "no drift term": ("train.kl_factor=0",),
    "drift 10": ("train.kl_factor=10",),
    "norm 1": ("train.norm_factor=1",),
    "last 10 layers frozen, 10 neurons": ("frozen_layers=10", "neurons=10"),
}

# KNE: one choice changed at a time, the others as in our first reading. The preset was chosen from these rows.
FIRST_READING = ("frozen_layers=0", "attribution.nodes=20")
CHOICES = {
    "our first reading": (),
    "last 3 layers frozen": ("frozen_layers=3",),
    "last 10 layers frozen": ("frozen_layers=10",),
    "p .1 %": ("share=0.001",),
    "p .3 %": ("share=0.003",),
    "p 3 %": ("share=0.03",),
    "alpha .25": ("train.lr=0.00025",),
    "alpha .5": ("train.lr=0.0005",),
    "alpha 2": ("train.lr=0.002",),
    "alpha 4": ("train.lr=0.004",),
    "alpha 5, n per layer": ("alpha=5", "alpha_per=layer"),
    "alpha 5, n of all": ("alpha=5", "alpha_per=all"),
    "drift": ("train.kl_factor=1",),
    "3 key layers": ("key_layers=3",),
    "path joint": ("attribution.path=joint",),
    "M 1": ("attribution.nodes=1",),
    "M 5": ("attribution.nodes=5",),
    "M 10": ("attribution.nodes=10",),
    "tokens apart": ("attribution.tokens=apart",),
    "answer greedy": ("attribution.answer=greedy",),
    "answer new": ("attribution.answer=new",),
    "all positions": ("attribution.everywhere=true",),
    "M 1, last 3 layers frozen": ("attribution.nodes=1", "frozen_layers=3"),
    "M 1, last 10 layers frozen": ("attribution.nodes=1", "frozen_layers=10"),
}

ROWS = (
    *(Row("independent", name, "fine", "independent", settings) for name, settings in REMEDIES.items()),
    Row("independent", "KNE", "kne", "independent"),
    Row("independent", "KN", "kn", "independent"),
    Row("independent", "NSE", "nse", "independent"),
    Row("independent", "MEMIT", "memit", "independent"),
    Row("batch", "FiNE", "fine", "batch"),
    Row("batch", "KNE", "kne", "batch"),
    Row("batch", "KNE, union", "kne", "batch", ("ensemble=union",)),
    Row("batch", "KNE, p 3 %, 50 steps", "kne", "batch", ("share=0.03", "train.steps=50")),
    Row("batch", "KNE, own", "kne", "batch", ("ensemble=own",)),
    Row("batch", "NSE", "nse", "batch"),
    Row("batch", "MEMIT", "memit", "batch"),
    Row("sequential", "FiNE", "fine", "sequential", limit=200, batch_size=1),
    Row("sequential", "FiNE, protect", "fine", "sequential", ("protect=true",), limit=200, batch_size=1),
    Row("sequential", "KNE", "kne", "sequential", limit=200, batch_size=1),
    Row("sequential", "KNE, batches of 10", "kne", "sequential", limit=200),
    Row("sequential", "NSE, batches of 10", "nse", "sequential", limit=200),
    *(Row("sweep", name, "fine", "independent", settings, 9000, 25) for name, settings in SWEEP.items()),
    *(
        Row("choices", name, "kne", "independent", (*FIRST_READING, *settings), 9000, 25)
        for name, settings in CHOICES.items()
    ),
)

COLUMNS = {
    "efficacy": "ES",
    "efficacy_tokens": "efficacy, tokens",
    "generalization": "PS",
    "generalization_tokens": "generalization, tokens",
    "specificity": "NS",
    "locality_tokens": "locality, tokens",
    "tokens_unchanged": "locality, whole",
    "fluency": "fluency",
    "perplexity": "perplexity",
}


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of metrics and costs, without the metrics that no row has."""
    shown = {
        name: head for name, head in COLUMNS.items() if any(r["edited"][name]["value"] is not None for r in results)
    }
    heads = ["", *shown.values(), "steps", "neurons", "of parameters", "CPU s per edit"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]

    unedited = [cell(results[0]["unedited"][name]["value"]) for name in shown]
    lines.append("| " + " | ".join(["unedited", *unedited, "", "", "", ""]) + " |")
    for result in results:
        cells = [cell(result["edited"][name]["value"]) for name in shown]
        cells += [f"{result['steps']:.1f}", f"{result['neurons']:.0f}", f"{result['share_of_parameters']:.3%}"]
        lines.append(
            "| " + " | ".join([result["row"]["name"], *cells, f"{result['process_seconds_per_edit']:.2f}"]) + " |"
        )
    return "\n".join(lines)


def cell(value: float | None) -> str:
    """A metric as text: two digits up to 1, one digit above."""
    if value is None:
        return ""
    return f"{value:.1f}" if value > 1 else f"{value:.2f}"
