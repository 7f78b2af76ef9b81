"""The generator: from the vector of a prompt to a neuron. A diffusion transformer over patches of the flat neuron.

Every entry of the neurons is standardised with its mean and deviation over the fitted neurons (the published code only
divides by 0.01). The result is cut into patches, one token each, and the network predicts the velocity of the diffusion
(:mod:`.diffusion`). In training, vectors are moved as another wording would move them, by noise and by shifts seen
between wordings of facts that are not edited; this is why the vector of a paraphrase works.

The published training takes 60 000 steps at a thousand edits. Deliberate differences here: the vector is an input of
every token, not of the modulation only; by default the network's output is the clean neuron, from which the velocity
follows; modulations start at zero; weights are averaged (EMA); the learning rate decays; samples are shuffled; no
variance is learned; and training stops when drawn neurons give the answers, not after a number of epochs chosen by
hand.

`MLPGenerator`, the control, predicts the neuron from the vector directly.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastedit.methods.meg.config import GeneratorConfig
from fastedit.methods.meg.diffusion import STEPS, Schedule, ddim
from fastedit.methods.meg.familiarity import Dropout, draw_masks_from, linear, scaled

# Sinusoids that encode a diffusion step.
FREQUENCIES = 256

# Smallest number of batches in an epoch.
PASS = 4


def waves(places: Tensor, width: int, cosine_first: bool) -> Tensor:
    """Sinusoids of (n,) numbers, (n, width), base 10 000."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=places.device) / (width // 2))
    angles = places[:, None].float() * rates[None]
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


class DiTBlock(nn.Module):
    """Attention and MLP, each after a norm without weights; u gives shift, scale and gate of both."""

    def __init__(self, width: int, heads: int, random: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = linear(width, 3 * width, random), linear(width, width, random)
        self.up, self.down = linear(width, 4 * width, random), linear(4 * width, width, random)
        self.modulation = linear(width, 6 * width, random)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """x: (n, n_tokens, width); u: (n, width)."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(u))[:, None].chunk(6, dim=-1)
        x = x + gate * self._attend(_norm(x) * (1 + scale) + shift)
        hidden = F.gelu(self.up(_norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.down(hidden)

    def _attend(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        query, key, value = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, width))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@dataclass(frozen=True)
class DiTShape:
    """Sizes of a `DiT`.

    size: length of a neuron; condition: width of the prompt's vector
    clean: the network's output is the clean neuron, from which the velocity is computed
    published: the released network, for comparison: the vector is added to the time embedding unchanged and is used
        nowhere else, and the head has two streams, the second of which would be the logits of a variance
    """

    size: int
    condition: int
    patch: int
    width: int
    blocks: int
    heads: int
    dropout: float = 0.0
    clean: bool = False
    published: bool = False


class DiT(nn.Module):
    """Velocity of noised neurons (n, size) at steps (n,) under vectors (n, condition). random: draws the weights"""

    positions: Tensor
    signal: Tensor
    sigma: Tensor

    def __init__(self, shape: DiTShape, random: torch.Generator | None = None) -> None:
        super().__init__()
        random = random or torch.Generator()
        self.shape = shape
        width = shape.width
        self.n_tokens = -(-shape.size // shape.patch)

        self.embed = linear(shape.patch, width, random)
        self.time = nn.Sequential(linear(FREQUENCIES, width, random), nn.SiLU(), linear(width, width, random))
        self.condition = nn.Identity() if shape.published else linear(shape.condition, width, random)
        self.spread = None if shape.published else linear(shape.condition, self.n_tokens * width, random)
        self.drop = Dropout(shape.dropout)

        blocks = [DiTBlock(width, shape.heads, random) for _ in range(shape.blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.last_modulation = linear(width, 2 * width, random)
        self.streams = linear(width, 2 * width, random) if shape.published else None
        self.out = linear(width, shape.patch, random)

        table = waves(torch.arange(self.n_tokens), width, cosine_first=False)
        self.register_buffer("positions", table, persistent=False)
        schedule = Schedule()
        self.register_buffer("signal", schedule.signal, persistent=False)
        self.register_buffer("sigma", schedule.sigma, persistent=False)

        if not shape.published:
            for layer in (*(block.modulation for block in blocks), self.last_modulation, self.out):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, steps: Tensor, vectors: Tensor) -> Tensor:
        """v, (n, size)."""
        padded = F.pad(x, (0, self.n_tokens * self.shape.patch - self.shape.size))
        tokens = self.embed(padded.view(len(x), self.n_tokens, -1)) + self.positions
        if self.spread is not None:
            tokens = tokens + self.spread(vectors).view(tokens.shape)

        u = self.drop(self.time(waves(steps, FREQUENCIES, cosine_first=True)) + self.condition(vectors))
        for block in self.blocks:
            tokens = block(tokens, u)

        shift, scale = self.last_modulation(F.silu(u))[:, None].chunk(2, dim=-1)
        tokens = _norm(tokens) * (1 + scale) + shift
        if self.streams is not None:
            tokens = self.streams(tokens).unflatten(-1, (self.shape.width, 2))[..., 0]

        predicted = self.out(tokens).flatten(1)[:, : self.shape.size]
        if self.shape.clean:
            return (self.signal[steps, None] * x - predicted) / self.sigma[steps, None]
        return predicted


class MLPGenerator(nn.Module):
    """Neurons (n, size) from vectors (n, condition) alone: the control without diffusion."""

    def __init__(
        self, condition: int, size: int, width: int, blocks: int, random: torch.Generator | None = None
    ) -> None:
        super().__init__()
        random = random or torch.Generator()
        self.embed, self.out = linear(condition, width, random), linear(width, size, random)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), linear(width, 4 * width, random), nn.GELU(), linear(4 * width, width, random)
            )
            for _ in range(blocks)
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """Standardised neurons."""
        x = self.embed(vectors)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


@dataclass(frozen=True)
class Scale:
    """Standardisation of neurons: mean and deviation of every entry, (size,) float32."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, flat: Tensor) -> Scale:
        """The scale of neurons (n, size). The deviation has a floor, so that entries that hardly differ stay small."""
        deviation = flat.std(0, correction=0)
        return cls(flat.mean(0), deviation.clamp_min(1e-3 * float(deviation.max()) + 1e-12))

    def shrink(self, flat: Tensor) -> Tensor:
        """Standardised neurons (n, size)."""
        return (flat - self.mean) / self.deviation

    def restore(self, small: Tensor) -> Tensor:
        """The inverse of `shrink`."""
        return small * self.deviation + self.mean


@dataclass(frozen=True)
class Generator:
    """A trained network with its scale. noise: (size,) the start of every draw"""

    net: nn.Module
    scale: Scale
    noise: Tensor
    sampler_steps: int

    @torch.no_grad()
    def __call__(self, vectors: Tensor, batch_size: int = 256) -> Tensor:
        """Neurons (n, size) float32 for unit vectors (n, width)."""
        drawn = [self._draw(scaled(part)) for part in torch.split(vectors, batch_size)]
        return torch.cat(drawn) if drawn else self.noise.new_empty(0, len(self.noise))

    def _draw(self, vectors: Tensor) -> Tensor:
        if isinstance(self.net, MLPGenerator):
            return self.scale.restore(self.net(vectors))
        noise = self.noise.expand(len(vectors), -1)
        return self.scale.restore(ddim(lambda x, steps: self.net(x, steps, vectors), noise, self.sampler_steps))


def make_net(config: GeneratorConfig, condition: int, size: int, random: torch.Generator | None = None) -> nn.Module:
    """The network that a config names, with weights drawn from `random`."""
    if config.kind == "mlp":
        return MLPGenerator(condition, size, config.width, config.blocks, random)
    clean = config.predicts == "clean"
    return DiT(
        DiTShape(size, condition, config.patch, config.width, config.blocks, config.heads, config.dropout, clean),
        random,
    )


class TrainingState(TypedDict):
    """What `Training.state` saves. random, dropout: states of the two random generators"""

    net: dict[str, Tensor]
    average: dict[str, Tensor]
    # The layout is torch's.
    optimiser: dict[str, Any]
    random: Tensor
    dropout: Tensor
    epoch: int
    losses: list[float]


@dataclass
class Training:
    """The state of a training: the network, its average, the optimiser, and the number of epochs done.

    random: draws order, steps, noise and shifts; dropout: draws masks; losses: one per epoch
    """

    net: nn.Module
    average: nn.Module
    optimiser: torch.optim.AdamW
    random: torch.Generator
    dropout: torch.Generator
    epoch: int = 0
    losses: list[float] = field(default_factory=list)

    @classmethod
    def start(
        cls, net: nn.Module, config: GeneratorConfig, seed: int, dropout: torch.Generator | None = None
    ) -> Training:
        """Epoch 0. dropout: None = one that is seeded as the other"""
        average = copy.deepcopy(net).eval().requires_grad_(False)
        optimiser = torch.optim.AdamW(net.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        dropout = dropout or torch.Generator().manual_seed(seed)
        draw_masks_from(net, dropout)

        return cls(net, average, optimiser, torch.Generator().manual_seed(seed), dropout)

    def state(self) -> TrainingState:
        """Everything that continuing bit for bit needs, for torch.save."""
        return {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": self.random.get_state(),
            "dropout": self.dropout.get_state(),
            "epoch": self.epoch,
            "losses": self.losses,
        }

    def load(self, state: TrainingState) -> None:
        """Continue from what `state` returned."""
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.random.set_state(state["random"])
        self.dropout.set_state(state["dropout"])
        self.epoch = state["epoch"]
        self.losses = list(state["losses"])


def train_epoch(
    run: Training, vectors: Tensor, targets: Tensor, config: GeneratorConfig, shifts: Tensor | None = None
) -> float:
    """One epoch over standardised neurons (n, size) and their unit vectors (n, width), shuffled; returns the mean loss.

    shifts: (m, width), differences between the vectors of two wordings
    Few neurons are repeated, each time with a step and noise of its own, so that an epoch has at least `PASS` batches.
    """
    repeats = max(1, PASS * config.batch_size // len(targets))
    n, batch = repeats * len(targets), min(config.batch_size, repeats * len(targets))
    per_epoch = -(-n // batch)
    schedule = Schedule()
    total = 0.0

    run.net.train()
    order = torch.randperm(n, generator=run.random) % len(targets)
    for number, part in enumerate(torch.split(order, batch)):
        step = run.epoch * per_epoch + number
        for group in run.optimiser.param_groups:
            group["lr"] = config.lr * _rate(step, config.epochs * per_epoch)

        inputs = _reworded(run, vectors[part], config.noise, shifts)
        loss = _loss(run, schedule, inputs, targets[part], config)
        run.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimiser.step()
        _follow(run.average, run.net, min(config.ema, (1 + step) / (10 + step)))
        total += float(loss.detach()) * len(part)

    run.epoch += 1
    run.losses.append(total / n)
    return total / n


def _reworded(run: Training, vectors: Tensor, noise: float, shifts: Tensor | None) -> Tensor:
    """Vectors moved by noise and a random shift, normalised again and scaled."""
    vectors = vectors + noise * torch.randn(vectors.shape, generator=run.random) / vectors.shape[1] ** 0.5
    if shifts is not None:
        vectors = vectors + shifts[torch.randint(len(shifts), (len(vectors),), generator=run.random)]
    return scaled(F.normalize(vectors, dim=1))


def _loss(run: Training, schedule: Schedule, vectors: Tensor, targets: Tensor, config: GeneratorConfig) -> Tensor:
    """Mean squared error of a batch, at random steps of the diffusion."""
    if isinstance(run.net, MLPGenerator):
        return F.mse_loss(run.net(vectors), targets)

    steps = torch.randint(STEPS, (len(targets),), generator=run.random)
    noise = torch.randn(targets.shape, generator=run.random)
    predicted = run.net(schedule.noised(targets, noise, steps), steps, vectors)
    errors = (predicted - schedule.velocity(targets, noise, steps)).square().mean(1)
    if config.predicts == "clean":
        # The error of the velocity is 1 / S times the error of the clean neuron.
        errors = errors * schedule.sigma[steps].square()
    return errors.mean()


def _rate(step: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up over the first hundredth, then a cosine down to a twentieth."""
    warm = max(1, total // 100)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


@torch.no_grad()
def _follow(average: nn.Module, net: nn.Module, keep: float) -> None:
    """average = keep * average + (1 - keep) * net, in place."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - keep)


def with_zeros(vectors: Tensor, flat: Tensor, unrelated: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """(vectors, neurons) with ratio * n unrelated vectors added, whose neuron is zero. The published "MeG+DA"."""
    count = min(len(unrelated), round(ratio * len(flat)))
    zeros = flat.new_zeros(count, flat.shape[1])
    return torch.cat([vectors, unrelated[:count]]), torch.cat([flat, zeros])


def start_noise(size: int, seed: int) -> Tensor:
    """The noise that every draw starts from, (size,) float32."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def judge_every(run: Training, every: int, judge: Callable[[nn.Module], float], wanted: float) -> bool:
    """Whether training may stop: every `every` epochs judge(average) is compared with `wanted`."""
    return run.epoch % every == 0 and judge(run.average) >= wanted
