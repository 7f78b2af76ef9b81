"""What is missing at the value layer, and the share of it that one layer writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastedit.methods.closed_form.keys import LayerCapture
from fastedit.methods.closed_form.values import Values
from fastedit.model.adapter import ModelAdapter
from fastedit.model.packed_passes import ValueSite
from fastedit.model.post_norm import PostNorm


class Share(NamedTuple):
    """What one layer has to write, (n_edits, d_model) float32 each.

    residual: z - h; in a post-norm model, what the output of the value layer's down-projection lacks
    written: the change that the layer's down-projection is solved for, which `ModelAdapter.value_gain` multiplies
    """

    residual: Tensor
    written: Tensor


def share_of(model: ModelAdapter, values: Values, captured: LayerCapture, layers: Sequence[int]) -> Share:
    """The share of a captured layer: an equal part of what is missing, for each of the layers left.

    layers: the captured layer and the edited ones above it, ascending

    Several layers of a post-norm model work towards the hidden state after the value layer. Each carries its part back
    through its own norm; the last one writes what completes that state, as far as its norm can make it. Raises
    ValueError for values without the stream beside which they were optimised."""
    device = captured.hidden.device
    z = values.z.to(device)
    if captured.sites is None:
        residual = z - captured.hidden
        return Share(residual, residual / len(layers) / model.value_gain)

    if values.stream is None:
        raise ValueError("values: several layers of a post-norm model need the residual stream beside them (`stream`)")
    stream = values.stream.to(device)
    start, wanted, present = ValueSite(stream, values.hidden.to(device)), ValueSite(stream, z), captured.sites.value

    last = PostNorm.of(model, layers[-1])
    residual = last.completed(start, wanted, present)
    if len(layers) == 1:
        return Share(residual, residual)

    part = last.missing(wanted, present) / len(layers)
    return Share(residual, PostNorm.of(model, captured.layer).carried(captured.sites.own, part))
