"""Keys and hidden states at the lookup tokens, from one pass that stops at every edited layer.

The published codes run the whole model once per edited layer for the keys and once more for the hidden states. A key at
layer e depends only on the tokens up to the lookup token and on the layers up to e. One pass that stops at every edited
layer therefore yields all of them. The rows that enter the first edited layer do not change between the rounds of a
batch, so they are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.methods.closed_form.selection import MassRule
from fastedit.methods.closed_form.solver import PastKeys, RidgeSolver
from fastedit.model.adapter import Mixed, ModelAdapter
from fastedit.model.packed_passes import RowTree, TreePass, ValueSite, take
from fastedit.model.tokens import lookup_prefix, rewrite_sequences
from fastedit.ops.capture_keys import Keys, capture_keys
from fastedit.ops.system_chain import Chain, system_chain
from fastedit.records.edit import Edit


class Sites(NamedTuple):
    """Where layers add to the residual stream, at the lookup tokens of the plain prompts, float32.

    own: at the captured layer; value: at the value layer
    """

    own: ValueSite
    value: ValueSite


class LayerCapture(NamedTuple):
    """What a sweep captures at one edited layer, with the weights as they are at that moment.

    gate, up: (n_edits, n_templates, d_ff) in the model's dtype, the outputs of the two projections at the lookup
        tokens; up is None where the feed-forward block has no up projection
    hidden: (n_edits, d_model) float32, the present value on the plain prompt: the hidden state after the value layer,
        or the output of its down-projection where the model is post-norm
    sites: where several layers of a post-norm model are swept; else None
    All tensors are on `ModelAdapter.device`.
    """

    layer: int
    gate: Tensor
    up: Tensor | None
    hidden: Tensor
    sites: Sites | None = None


class KeySweep:
    """Sweeps over the edited layers for one batch of edits.

    edits: the batch; templates: context templates, the first of them "{}"; layers: the edited layers, ascending

    Iterating yields a LayerCapture per layer, lowest layer first. The caller may change that layer's down-projection
    before it asks for the next capture, and the sweep continues with the changed weight. Each round iterates again;
    the rows below the first edited layer are kept. Use inside `model.packed()` and `torch.no_grad()`.
    Raises ValueError for layers that `ModelAdapter.check_layers` refuses.
    """

    def __init__(
        self, model: ModelAdapter, edits: Sequence[Edit], templates: Sequence[str], layers: Sequence[int]
    ) -> None:
        model.check_layers(layers)
        self.model = model
        self.layers = tuple(layers)
        self.n_edits = len(edits)
        self.n_templates = len(templates)
        self.weights = template_weights(self.n_templates).to(model.device)

        rewrites = rewrite_sequences(model.tokenizer, edits, templates)
        prefixes = [lookup_prefix(sequence) for rows in rewrites for sequence in rows]
        self.entry = TreePass.start(model, prefixes).run(model, range(self.layers[0]))
        self.lookup = self.entry.tree.last()

        # The plain prompt of an edit is its first template's.
        plain = range(0, len(prefixes), self.n_templates)
        self.plain = self.entry.subset(model, [prefixes[s] for s in plain], plain)
        self.plain_lookup = self.plain.tree.last()
        self.plain_rows = _rows_in(self.entry.tree, self.plain.tree, plain).to(self.entry.rows.device)

    def __iter__(self) -> Iterator[LayerCapture]:
        model = self.model
        sweep = self.entry
        shape = (self.n_edits, self.n_templates, model.d_ff)

        for position, layer in enumerate(self.layers):
            mixed = model.mix(layer, sweep.rows, sweep.plan, sweep.rotary)
            sites = self._sites(layer, mixed)
            hidden = self._hidden(layer, mixed) if sites is None else sites.value.output

            gate, up = model.gate_up(layer, take(mixed.ffn_input, self.lookup))
            gate = gate.to(model.device).reshape(shape)
            up = None if up is None else up.to(model.device).reshape(shape)
            yield LayerCapture(layer, gate, up, hidden, sites)

            if position + 1 < len(self.layers):
                between = range(layer + 1, self.layers[position + 1])
                sweep = sweep.at(model.feed_forward(layer, mixed)).run(model, between)

    def keys(self, captured: LayerCapture, active: Tensor | None = None) -> Keys:
        """Keys of all edits, (n_edits, d_ff) float32, and their mass over the active edits, (d_ff,) float32.

        active: (n_edits,) bool; None = all edits"""
        name = self.model.activation_name
        return capture_keys(captured.gate, captured.up, self.weights, name, active)

    def chain(
        self, captured: LayerCapture, active: Tensor, solver: RidgeSolver, past: PastKeys, rule: MassRule
    ) -> Chain:
        """Keys and mass as from `keys`, the neurons that `rule` selects, and their system matrix, in one chain that
        does not wait for the device. `Chain.read` returns neurons and matrix."""
        return system_chain(
            captured.gate,
            captured.up,
            self.weights,
            self.model.activation_name,
            active,
            solver.moment,
            solver.weight,
            past.dense,
            past.rows,
            reaching=rule.reaching,
            within=rule.within,
        )

    def _hidden(self, layer: int, mixed: Mixed) -> Tensor:
        """The present value, (n_edits, d_model) float32. Above `layer` only the rows of the plain prompts are run."""
        model = self.model
        last = self.layers[-1]
        rows = take(self.plain_rows, self.plain_lookup) if layer == last else self.plain_rows
        plain = Mixed(take(mixed.residual, rows), take(mixed.ffn_input, rows))
        if model.post_norm:
            return model.ffn_output(layer, plain.ffn_input).float().to(model.device)

        hidden = model.feed_forward(layer, plain)
        if layer < last:
            above = range(layer + 1, last + 1)
            hidden = model.run(hidden, above, self.plain.plan, self.plain.rotary, tail=self.plain_lookup)
        return hidden.float().to(model.device)

    def _sites(self, layer: int, mixed: Mixed) -> Sites | None:
        """As `LayerCapture.sites`. Above `layer` only the rows of the plain prompts are run."""
        model, last = self.model, self.layers[-1]
        if not model.post_norm or len(self.layers) == 1:
            return None

        plain = Mixed(take(mixed.residual, self.plain_rows), take(mixed.ffn_input, self.plain_rows))
        own = self._site(layer, plain)
        if layer == last:
            return Sites(own, own)

        rows = model.feed_forward(layer, plain)
        rows = model.run(rows, range(layer + 1, last), self.plain.plan, self.plain.rotary)
        return Sites(own, self._site(last, model.mix(last, rows, self.plain.plan, self.plain.rotary)))

    def _site(self, layer: int, plain: Mixed) -> ValueSite:
        """plain: the rows of the plain prompts after the layer's attention"""
        output = self.model.ffn_output(layer, take(plain.ffn_input, self.plain_lookup))
        stream = take(plain.residual, self.plain_lookup)
        return ValueSite(*(part.float().to(self.model.device) for part in (stream, output)))


def template_weights(n_templates: int) -> Tensor:
    """Weight of each context template in the mean of a key, (n_templates,) float32.

    Half for the plain template, half shared by the sampled ones: the two groups of MEMIT's released code."""
    if n_templates == 1:
        return torch.ones(1)

    weights = torch.full((n_templates,), 0.5 / (n_templates - 1))
    weights[0] = 0.5
    return weights


def _rows_in(tree: RowTree, part: RowTree, sources: Sequence[int]) -> Tensor:
    """The row of `tree` for each row of `part`, (part.n_rows,) int64.

    sources: sequence i of `part` is sequence sources[i] of `tree`"""
    rows = torch.zeros(part.n_rows, dtype=torch.int64)
    for path, source in zip(part.paths, sources, strict=True):
        rows[torch.tensor(path)] = torch.tensor(tree.paths[source])
    return rows
