"""Keys and hidden states at lookup tokens, in one incremental sweep over the edited layers.

The published codes run the whole model once per layer for keys and once more for hidden states. A key at layer e
depends on the tokens up to the lookup token and the layers up to e alone, so one pass that stops at every edited layer
gives all of them, and the rows entering the first edited layer are the same in every round of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.model.adapter import Mixed, ModelAdapter
from fastedit.model.packed_passes import TreePass, take
from fastedit.model.tokens import lookup_prefix, rewrite_sequences
from fastedit.ops.capture_keys import Keys, capture_keys
from fastedit.ops.system_chain import Chain, system_chain
from fastedit.records.edit import Edit


class LayerCapture(NamedTuple):
    """What a sweep finds at one edited layer, with the weights as they are at that moment.

    gate, up: (n_edits, n_templates, d_ff) at the lookup tokens; up is None where the feed-forward has no such part
    hidden: (n_edits, d_model) float32, the present value on the plain prompt: the hidden state after the value layer,
        or its down-projection's output where the model is post-norm
    All on `ModelAdapter.device`.
    """

    layer: int
    gate: Tensor
    up: Tensor | None
    hidden: Tensor


class KeySweep:
    """Sweeps over the edited layers for one batch of edits.

    Iterating yields a LayerCapture per layer, shallow to deep; the caller may change that layer's down-projection
    before it asks for the next one, and the sweep goes on with the changed weight. It can be iterated again (the next
    round): the rows below the first edited layer are kept. Use inside `model.packed()` and `torch.no_grad()`.
    Raises ValueError for several layers of a post-norm model.
    """

    def __init__(
        self, model: ModelAdapter, edits: Sequence[Edit], templates: Sequence[str], layers: Sequence[int]
    ) -> None:
        model.check_layers(layers)
        self.model, self.layers = model, tuple(layers)
        self.n_edits, self.n_templates = len(edits), len(templates)
        rewrites = rewrite_sequences(model.tokenizer, edits, templates)
        sequences = [lookup_prefix(sequence) for rows in rewrites for sequence in rows]
        self.entry = TreePass.start(model, sequences).run(model, range(self.layers[0]))
        self.lookup = self.entry.tree.last()
        plain = range(0, len(sequences), self.n_templates)
        self.plain = self.entry.subset(model, [sequences[s] for s in plain], plain)
        self.plain_lookup = self.plain.tree.last()
        self.plain_rows = torch.zeros(self.plain.tree.n_rows, dtype=torch.int64)
        for path, source in zip(self.plain.tree.paths, plain, strict=True):
            self.plain_rows[torch.tensor(path)] = torch.tensor(self.entry.tree.paths[source])
        self.plain_rows = self.plain_rows.to(self.entry.rows.device)
        self.weights = template_weights(self.n_templates).to(model.device)

    def __iter__(self) -> Iterator[LayerCapture]:
        model, sweep = self.model, self.entry
        shape = (self.n_edits, self.n_templates, model.d_ff)
        for position, layer in enumerate(self.layers):
            mixed = model.mix(layer, sweep.rows, sweep.plan, sweep.rotary)
            hidden = self._hidden(layer, mixed)
            gate, up = model.gate_up(layer, take(mixed.ffn_input, self.lookup))
            gate = gate.to(model.device).reshape(shape)
            up = None if up is None else up.to(model.device).reshape(shape)
            yield LayerCapture(layer, gate, up, hidden)
            if position + 1 < len(self.layers):
                between = range(layer + 1, self.layers[position + 1])
                sweep = sweep.at(model.feed_forward(layer, mixed)).run(model, between)

    def keys(self, captured: LayerCapture, active: Tensor | None = None) -> Keys:
        """Keys of all edits, and their mass over the active ones."""
        name = self.model.activation_name
        return capture_keys(captured.gate, captured.up, self.weights, name, active)

    def chain(
        self,
        captured: LayerCapture,
        active: Tensor,
        moment: Tensor,
        weight: float,
        history: Tensor | None,
        past: Tensor | None,
        rule: dict[str, float],
    ) -> Chain:
        """Keys and mass as above, the neurons that `rule` selects by mass, and their system matrix, to be read.

        moment, weight, history, past: as of `system_chain`; rule: one of its two shares by name"""
        name = self.model.activation_name
        rows = (captured.gate, captured.up, self.weights, name, active)
        return system_chain(
            *rows, moment, weight, history, past, reaching=rule.get("reaching"), within=rule.get("within")
        )

    def _hidden(self, layer: int, mixed: Mixed) -> Tensor:
        """The present value: the plain prompts' rows alone go on from here."""
        model, last = self.model, self.layers[-1]
        rows = take(self.plain_rows, self.plain_lookup) if layer == last else self.plain_rows
        plain = Mixed(take(mixed.residual, rows), take(mixed.ffn_input, rows))
        if model.post_norm:
            return model.ffn_output(layer, plain.ffn_input).float().to(model.device)
        found = model.feed_forward(layer, plain)
        if layer < last:
            above = range(layer + 1, last + 1)
            found = model.run(found, above, self.plain.plan, self.plain.rotary, tail=self.plain_lookup)
        return found.float().to(model.device)


def template_weights(n_templates: int) -> Tensor:
    """(n_templates,) float32: half for the plain template, half shared by the sampled ones (MEMIT's two groups)."""
    if n_templates == 1:
        return torch.ones(1)
    weights = torch.full((n_templates,), 0.5 / (n_templates - 1))
    weights[0] = 0.5
    return weights
