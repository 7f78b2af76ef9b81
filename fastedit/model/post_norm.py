"""The norm behind a down-projection, and how a wanted change of the hidden state is carried back through it.

The norm's input x is the down-projection's output, or its sum with the residual stream (OPT 350M). RMSNorm and
LayerNorm are
    norm(x) = g * unit(x) + b,    unit(x) = (x - m(x)) / s(x)
with m the mean (0 in RMSNorm) and s the root mean square of x - m. Mean and scale of x have no effect, so an output can
only be turned: norm(x) changes by r = g * (u - unit(x)) when x becomes s u, whatever the scale s.

A trained gain g has coordinates near 0, where a change of the hidden state would take an input without bound. The
division r / g is therefore damped: g r / (g^2 + mu) lowers |g y - r|^2 + mu |y|^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.model.packed_passes import ValueSite

# mu as a share of the median of g^2. Measured on Gemma 3 270M (docs/presets.md): with .01 the changes in coordinates of
# small gain do more harm than the layers do good.
DAMPING = 1.0


@dataclass(frozen=True)
class PostNorm:
    """The norm behind the down-projection of one layer of `model`.

    gain: g, (d_model,) float32; centred: whether the norm takes off the mean
    of_sum: whether its input is the sum of residual stream and output; damping: see `DAMPING`
    Rows of sites and results are (n, d_model) float32, on `ModelAdapter.device`.
    """

    model: ModelAdapter
    layer: int
    gain: Tensor
    centred: bool
    of_sum: bool
    damping: float = DAMPING

    @classmethod
    @torch.no_grad()
    def of(cls, model: ModelAdapter, layer: int) -> PostNorm:
        """The norm of a layer of a post-norm model; its gain is read off what it makes of chosen rows."""
        # Mean 0 and root mean square 1, like 0 and 1 exact in half precision.
        signs = torch.ones(model.d_model)
        signs[1::2] = -1

        up, down, raised = _normed(model, layer, torch.stack([signs, -signs, signs + 1]).to(model.device))
        gain = (up - down) / 2 * signs.to(up.device)
        # A norm that keeps the mean makes 2 and 0 of 1 and -1, both divided by sqrt(2).
        centred = bool((raised - up).norm() < 0.1 * up.norm())

        return cls(model, layer, gain, centred, of_sum=model.family.output_norm is not None)

    def missing(self, wanted: ValueSite, present: ValueSite) -> Tensor:
        """The hidden state after the layer at `wanted`, less that at `present`."""
        before, after = (_normed(self.model, self.layer, self._input(site)) for site in (present, wanted))
        change = after - before

        return change if self.of_sum else change + (wanted.residual - present.residual)

    def carried(self, present: ValueSite, change: Tensor) -> Tensor:
        """What the output at `present` must change by, so that the hidden state after the layer changes by `change`.

        Up to the damping this is exact for a change that the norm can make. Of any other, what would lengthen
        unit(x) is lost; that error is of first order in `change`."""
        return self._centre(self._scale(self._input(present)) * self._divided(change))

    def factor(self, present: ValueSite) -> Tensor:
        """g / s(x), (n, d_model): what a small change of the output at `present` is multiplied by on its way into the
        hidden state, but for the part that lengthens x."""
        return self.gain / self._scale(self._input(present)).clamp_min(_TINY)

    def completed(self, start: ValueSite, wanted: ValueSite, present: ValueSite) -> Tensor:
        """What the output at `present` must change by, so that the hidden state after the layer is that at `wanted`.

        wanted: the stream at the start, with the optimised output; start: the same with the unchanged one

        The direction follows from the hidden state; what the stream has gained is carried over to it. The scale is
        free. An optimised output is often longer than the unchanged one, which holds its direction against what other
        edits and contexts add. So the scale goes from the present to the optimised one by the share of the way that
        is left to turn: nothing is written where nothing is missing, and the optimised output where all is."""
        first, last, now = (self._input(site) for site in (start, wanted, present))
        target = self._unit(last)
        if not self.of_sum:
            target = self._unit(target + self._divided(wanted.residual - present.residual))

        way = torch.linalg.vector_norm(self._unit(last) - self._unit(first), dim=1, keepdim=True)
        left = torch.linalg.vector_norm(target - self._unit(now), dim=1, keepdim=True)
        share = (left / way.clamp_min(_TINY)).clamp(max=1)

        return torch.lerp(self._scale(now), self._scale(last), share) * target - self._centre(now)

    def _input(self, site: ValueSite) -> Tensor:
        """x, what the norm reads."""
        return site.residual + site.output if self.of_sum else site.output

    def _centre(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(1, keepdim=True) if self.centred else rows

    def _scale(self, rows: Tensor) -> Tensor:
        """s(x), (n, 1)."""
        return self._centre(rows).square().mean(1, keepdim=True).sqrt()

    def _unit(self, rows: Tensor) -> Tensor:
        return self._centre(rows) / self._scale(rows).clamp_min(_TINY)

    def _divided(self, change: Tensor) -> Tensor:
        """change / g, damped."""
        squared = self.gain.square()

        return self.gain * change / (squared + self.damping * squared.median())


_TINY = torch.finfo(torch.float32).tiny


def _normed(model: ModelAdapter, layer: int, rows: Tensor) -> Tensor:
    """The layer's norm of rows (n, d_model), in the model's own precision; float32 on the device of the rows."""
    given = rows.to(model.layer_device(layer), model.dtype)

    return model.join(layer, torch.zeros_like(given), given).to(rows.device, torch.float32)
