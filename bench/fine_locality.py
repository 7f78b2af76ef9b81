"""Why FiNE changes the answers to neighbouring questions: which token its neurons push, and where else they fire.

    python bench/fine_locality.py --data counterfact-edit.json --start 500 --limit 100

Every edit is written alone into the unedited model, as in `columns.py`. A chosen neuron *fires* at a neighbour's
question if its activation where the answer is due has the sign of that at the edit's own prompt and more than half its
size.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from column_rows import Row
from columns import Bench, Cost
from timing import machine_line

from fastedit.methods.columns.contributions import choose_slots, observe, old_tokens
from fastedit.model.tokens import whole_sequences
from fastedit.records.edit import Edit

FUNCTION_WORDS = {"the", "a", "an", "in", "of", "to", "for", "on", "at", "by", "and", "as", "his", "her", "its", "not"}


def activations(bench: Bench, prompts: Sequence[str], targets: Sequence[str], layers: range) -> torch.Tensor:
    """Activations where the target's first token is predicted, (n_layers, n_prompts, d_ff)."""
    sequences = whole_sequences(bench.model.tokenizer, prompts, targets)
    observed = observe(bench.model, sequences, layers)
    first = torch.tensor([0, *[len(s.targets) for s in sequences]]).cumsum(0)[:-1]
    return torch.stack([observed.activations[layer][first] for layer in layers])


def examine(bench: Bench, edits: Sequence[Edit], settings: Sequence[str]) -> list[dict[str, Any]]:
    """A record per edit.

    said: the greedy token at its prompt; neurons: (layer, neuron) chosen for the first target token
    fires: share of these neurons that fire at the neighbour's question
    unchanged: share of the neighbour's answer tokens that stay"""
    row = Row("", "", "fine", "independent", tuple(settings))
    editor = bench.editor(row)
    before = bench.measure(edits, None, 0)

    config: Any = editor.config
    layers = range(bench.model.n_layers)
    candidates = range(bench.model.n_layers - config.frozen_layers)
    tokens = old_tokens(bench.model.tokenizer, edits) if config.token == "old" else ()
    with torch.no_grad(), bench.model.packed():
        own = activations(bench, [e.prompt for e in edits], [e.target_new for e in edits], layers)
        near = activations(bench, [e.locality[0].prompt for e in edits], [e.target_new for e in edits], layers)
        sequences = whole_sequences(bench.model.tokenizer, [e.prompt for e in edits], [e.target_new for e in edits])
        said = observe(bench.model, sequences, ()).greedy.tolist()
        left_out = editor.state.left_out
        slots = choose_slots(bench.model, sequences, config.neurons, candidates, tokens=tokens, excluded=left_out)

    records: list[dict[str, Any]] = []
    first = 0
    for number, _ in enumerate(bench.alone(editor, edits, Cost(bench.model.d_model, 1))):
        after = bench.measure(edits[number : number + 1], None, 0).metrics(before)
        here = (slots.edits == number).nonzero().flatten()[: config.neurons]
        place = slots.layers[here], number, slots.neurons[here]
        fires = (near[place] / own[place]) > 0.5
        records.append(
            {
                "said": bench.model.tokenizer.decode([said[first]]).strip(),
                "neurons": list(zip(place[0].tolist(), place[2].tolist(), strict=True)),
                "fires": float(fires.float().mean()),
                "unchanged": after["locality_tokens"].value,
            }
        )
        first += len(sequences[number].targets)
    return records


def summary(name: str, records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return f"{name:<34}  0 edits"
    unchanged, fires = (sum(record[key] for record in records) / len(records) for key in ("unchanged", "fires"))
    return (
        f"{name:<34}{len(records):>3} edits, neighbours' tokens unchanged {unchanged:.2f}, neurons that fire there"
        f" {fires:.2f}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--start", type=int, default=500)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--moments", type=Path, help="background text; default: sampled from the model")
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    # `Bench` reads these too; none of what they ask for is measured here.
    options.text, options.fluency, options.out = None, 0, None
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    edits = bench.edits(Row("", "", "fine", "independent", (), options.start, options.limit))
    records = examine(bench, [edit for edit in edits if edit.locality], options.settings)

    print(machine_line())
    print("said most often:", Counter(record["said"] for record in records).most_common(5))
    print("chosen most often:", Counter(neuron for record in records for neuron in record["neurons"]).most_common(5))

    is_word = [record["said"].lower() in FUNCTION_WORDS for record in records]
    words = [record for record, flag in zip(records, is_word, strict=True) if flag]
    others = [record for record, flag in zip(records, is_word, strict=True) if not flag]
    print(summary("all", records))
    print(summary("a function word was said", words))
    print(summary("another token was said", others))
    print(summary("fewer than half fire there", [record for record in records if record["fires"] < 0.5]))
    print(summary("half or more fire there", [record for record in records if record["fires"] >= 0.5]))


if __name__ == "__main__":
    main()
