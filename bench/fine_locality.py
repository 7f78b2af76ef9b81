"""Why FiNE changes the answers to neighbouring questions: what its neurons push, and where else they fire.

    python bench/fine_locality.py --data counterfact-edit.json --start 500 --limit 100

Every edit is made alone in the unedited model, as in `columns.py`. A chosen neuron *fires* at a neighbour's question if
its activation there, where the answer is due, is more than half of that at the edit's own prompt and of its sign.
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
    """(n_layers, n_prompts, d_ff) where the target's first token is predicted."""
    sequences = whole_sequences(bench.model.tokenizer, prompts, targets)
    observed = observe(bench.model, sequences, layers)
    first = torch.tensor([0, *[len(s.targets) for s in sequences]]).cumsum(0)[:-1]
    return torch.stack([observed.activations[layer][first] for layer in layers])


def examine(bench: Bench, edits: Sequence[Edit], settings: Sequence[str]) -> list[dict[str, Any]]:
    """Per edit: the token scored first, its neurons, the share of them that fires at the neighbour's question, and the
    share of the neighbour's tokens that stay."""
    row = Row("", "", "fine", "independent", tuple(settings))
    editor = bench.editor(row)
    before = bench.measure(edits, None, 0)
    config: Any = editor.config
    layers, chosen = range(bench.model.n_layers), range(bench.model.n_layers - config.frozen_layers)
    tokens = old_tokens(bench.model.tokenizer, edits) if config.token == "old" else ()
    with torch.no_grad(), bench.model.packed():
        own = activations(bench, [e.prompt for e in edits], [e.target_new for e in edits], layers)
        near = activations(bench, [e.locality[0].prompt for e in edits], [e.target_new for e in edits], layers)
        sequences = whole_sequences(bench.model.tokenizer, [e.prompt for e in edits], [e.target_new for e in edits])
        said = observe(bench.model, sequences, ()).greedy.tolist()
        left_out = editor.state.left_out
        slots = choose_slots(bench.model, sequences, config.neurons, chosen, tokens=tokens, excluded=left_out)
    found, first = [], 0
    for number, _ in enumerate(bench.alone(editor, edits, Cost(bench.model.d_model, 1))):
        after = bench.measure(edits[number : number + 1], None, 0).metrics(before)
        here = (slots.edits == number).nonzero().flatten()[: config.neurons]
        place = slots.layers[here], number, slots.neurons[here]
        fires = (near[place] / own[place]) > 0.5
        found.append(
            {
                "said": bench.model.tokenizer.decode([said[first]]).strip(),
                "neurons": list(zip(place[0].tolist(), place[2].tolist(), strict=True)),
                "fires": float(fires.float().mean()),
                "kept": after["locality_tokens"].value,
            }
        )
        first += len(sequences[number].targets)
    return found


def summary(name: str, found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return f"{name:<34}  0 edits"
    kept, fires = (sum(part[key] for part in found) / len(found) for key in ("kept", "fires"))
    return f"{name:<34}{len(found):>3} edits, neighbours' tokens kept {kept:.2f}, neurons that fire there {fires:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--start", type=int, default=500)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--moments", type=Path, help="background text; default: sampled from the model")
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.text, options.fluency, options.out = None, 0, None
    bench = Bench(options)
    edits = bench.edits(Row("", "", "fine", "independent", (), options.start, options.limit))
    found = examine(bench, [edit for edit in edits if edit.locality], options.settings)
    print(machine_line())
    print("said most often:", Counter(part["said"] for part in found).most_common(5))
    print("chosen most often:", Counter(neuron for part in found for neuron in part["neurons"]).most_common(5))
    print(summary("all", found))
    words = [part["said"].lower() in FUNCTION_WORDS for part in found]
    print(summary("a function word was said", [part for part, is_word in zip(found, words, strict=True) if is_word]))
    print(summary("another token was said", [part for part, is_word in zip(found, words, strict=True) if not is_word]))
    print(summary("fewer than half fire there", [part for part in found if part["fires"] < 0.5]))
    print(summary("half or more fire there", [part for part in found if part["fires"] >= 0.5]))


if __name__ == "__main__":
    main()
