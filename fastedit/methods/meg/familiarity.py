"""The gate: whether a prompt asks about an edit, by a network that has memorised random labels of the edits.

Every edit gets a random label, and a small residual network F overfits (vector of the prompt -> label). On prompts that
F was trained on, and on prompts close to them, its output is confident; elsewhere it is not. The entropy is the gate:
    H = - sum_c p_c ln p_c,  p clamped at 1e-8, in nats (at most ln n_labels);   edited iff H < threshold, strictly
Nothing in the published loss pushes text unlike any edit to high entropy; here a second loss term keeps the output
uniform on prompts of facts that are not edited, if there are any (`background`). The published code runs the encoder
for every sample of every epoch; here vectors are computed once, and added noise replaces the encoder's dropout. Labels
and noise are seeded, and training stops when the gate knows its edits, not after a number of epochs chosen by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastedit.methods.meg.config import FamiliarityConfig

# Probabilities are clamped here before the logarithm.
SMALLEST_PROBABILITY = 1e-8


def linear(inputs: int, outputs: int, random: torch.Generator) -> nn.Linear:
    """torch's layer in torch's initialisation, drawn from a generator: other threads draw from the global one."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=random)
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(layer.bias, -bound, bound, generator=random)

    return layer


class Dropout(nn.Module):
    """torch's dropout on a CPU, with masks from a generator of its own: `random`, given before it is trained.

    share: of the entries that are dropped"""

    random: torch.Generator | None = None

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Entries kept in training are divided by 1 - share."""
        if not self.training or self.share == 0:
            return x

        keep = torch.empty_like(x).bernoulli_(1 - self.share, generator=self.random)
        return x * keep.div_(1 - self.share)


def draw_masks_from(net: nn.Module, random: torch.Generator) -> None:
    """Let all dropouts of a network draw from one generator."""
    for part in net.modules():
        if isinstance(part, Dropout):
            part.random = random


class FamiliarityNet(nn.Module):
    """Residual blocks x + drop(W2 gelu(W1 x)), then a linear layer onto the labels. No norm layers, as published.

    width: of the vectors; hidden: inside a block; blocks, labels: how many; dropout: its probability
    random: draws the weights"""

    def __init__(
        self,
        width: int,
        hidden: int,
        blocks: int,
        labels: int,
        dropout: float,
        random: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        random = random or torch.Generator()
        self.blocks = nn.ModuleList(
            nn.Sequential(linear(width, hidden, random), nn.GELU(), linear(hidden, width, random), Dropout(dropout))
            for _ in range(blocks)
        )
        self.out = linear(width, labels, random)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits (n, labels) of vectors (n, width)."""
        for block in self.blocks:
            vectors = vectors + block(vectors)
        return self.out(vectors)


def entropy(logits: Tensor) -> Tensor:
    """H of the softmax of logits (n, n_labels), (n,) in nats."""
    p = torch.softmax(logits.float(), dim=1).clamp_min(SMALLEST_PROBABILITY)
    return -(p * p.log()).sum(1)


def is_familiar(entropies: Tensor, threshold: float) -> Tensor:
    """(n,) bool: H < threshold, strictly."""
    return entropies < threshold


@dataclass(frozen=True)
class Familiarity:
    """A trained network in evaluation mode, for unit vectors."""

    net: FamiliarityNet

    @torch.no_grad()
    def __call__(self, vectors: Tensor) -> Tensor:
        """Entropies (n,) of unit vectors (n, width)."""
        return entropy(self.net(scaled(vectors)))


def scaled(vectors: Tensor) -> Tensor:
    """Unit vectors (n, width) times sqrt(width): entries of about one suit linear layers."""
    return vectors * vectors.shape[1] ** 0.5


def make_net(width: int, config: FamiliarityConfig, random: torch.Generator | None = None) -> FamiliarityNet:
    """A network for vectors of `width`, in torch's default initialisation drawn from `random`."""
    return FamiliarityNet(width, config.hidden_ratio * width, config.blocks, config.labels, config.dropout, random)


def train_familiarity(
    vectors: Tensor,
    config: FamiliarityConfig,
    seed: int,
    background: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Familiarity:
    """Memorise n edits.

    vectors: (n, width) unit vectors of their prompts; background: (m, width), those of other prompts
    progress: called with 1 per epoch
    Stops when a share `config.learned` of the edits has an entropy below config.sure / 2 nats, or after
    `config.epochs`."""
    random = torch.Generator().manual_seed(seed)
    net = make_net(vectors.shape[1], config, random)
    draw_masks_from(net, random)
    labels = torch.randint(config.labels, (len(vectors),), generator=random)
    optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    for epoch in range(config.epochs):
        net.train()
        for part in torch.split(torch.randperm(len(vectors), generator=random), config.batch_size):
            loss = F.cross_entropy(net(_noisy(vectors[part], config.noise, random)), labels[part])
            if background is not None and config.background > 0:
                drawn = background[torch.randint(len(background), (len(part),), generator=random)]
                # Cross-entropy towards the uniform distribution.
                loss = loss - config.background * F.log_softmax(net(_noisy(drawn, config.noise, random)), 1).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()

        if progress is not None:
            progress(1)
        if epoch % 10 == 9:
            net.eval()
            known = is_familiar(Familiarity(net)(vectors), config.sure / 2)
            if float(known.float().mean()) >= config.learned:
                break

    net.eval()
    net.requires_grad_(False)
    return Familiarity(net)


def _noisy(vectors: Tensor, noise: float, random: torch.Generator) -> Tensor:
    """Unit vectors plus Gaussian noise of length `noise`, normalised again and scaled."""
    moved = vectors + noise * torch.randn(vectors.shape, generator=random) / vectors.shape[1] ** 0.5
    return scaled(F.normalize(moved, dim=1))


def choose_threshold(own: Tensor, reworded: Tensor, unrelated: Tensor) -> float:
    """The score below which a prompt counts as edited, chosen on a development slice.

    own, reworded, unrelated: (n,) scores each, of the slice's prompts, their paraphrases, and prompts that must not
    change. Candidates lie halfway between two scores that occur. The one with the largest harmonic mean of the three
    shares judged right is chosen; among equals, the smallest."""
    scores = torch.unique(torch.cat([own, reworded, unrelated]).double())
    middle = (scores[1:] + scores[:-1]) / 2
    bounds = torch.cat([middle, scores[-1:] + 1e-6])

    shares = torch.stack(
        [
            (own[None].double() < bounds[:, None]).double().mean(1),
            (reworded[None].double() < bounds[:, None]).double().mean(1),
            (unrelated[None].double() >= bounds[:, None]).double().mean(1),
        ]
    )
    # The largest harmonic mean has the smallest sum of inverses.
    return float(bounds[int((1 / shares.clamp_min(1e-9)).sum(0).argmin())])
