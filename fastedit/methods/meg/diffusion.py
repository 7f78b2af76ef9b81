"""The diffusion model of the generator: its schedule, its velocity, and the deterministic sampler.

    x_t = A_t x + S_t n,  A = sqrt(abar), S = sqrt(1 - abar);   velocity v = A n - S x
    clean estimate  A x_t - S v;   noise estimate  S x_t + A v
beta grows linearly from 1e-4 to 0.02 over 1000 steps. Sampling is DDIM with eta = 0 on a respaced list of steps, as in
the paper; the published code adds noise at every step and learns a variance, and the reverse formula printed in the
paper is that of noise prediction. Here every draw starts from one stored noise vector, so a prompt's neuron is a
function of its vector, and answers do not change from run to run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02


def alpha_bar() -> Tensor:
    """abar of every step, (1000,) float64."""
    return (1 - torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64)).cumprod(0)


class Schedule:
    """A and S of every step, (1000,) float32. device: None = torch's default device"""

    def __init__(self, device: torch.device | str | None = None) -> None:
        bars = alpha_bar()
        self.signal = bars.sqrt().float()
        self.sigma = (1 - bars).sqrt().float()

        if device is not None:
            self.signal = self.signal.to(device)
            self.sigma = self.sigma.to(device)

    def noised(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_t of x (n, size) and noise (n, size) at steps (n,)."""
        return self.signal[steps, None] * clean + self.sigma[steps, None] * noise

    def velocity(self, clean: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """v, what the network learns."""
        return self.signal[steps, None] * noise - self.sigma[steps, None] * clean

    def clean(self, noised: Tensor, velocity: Tensor, steps: Tensor) -> Tensor:
        """The clean estimate of x from x_t and v, each (n, size)."""
        return self.signal[steps, None] * noised - self.sigma[steps, None] * velocity

    def noise(self, noised: Tensor, velocity: Tensor, steps: Tensor) -> Tensor:
        """The noise estimate from x_t and v, each (n, size)."""
        return self.sigma[steps, None] * noised + self.signal[steps, None] * velocity


def respaced(n_steps: int) -> list[int]:
    """n_steps of the 1000 steps, ascending, evenly spaced with both ends; [999] for one step.

    Raises ValueError unless 1 <= n_steps <= 1000."""
    if not 1 <= n_steps <= STEPS:
        raise ValueError(f"sampler steps must lie in 1-{STEPS}, got {n_steps}")
    if n_steps == 1:
        return [STEPS - 1]
    return [round(j * (STEPS - 1) / (n_steps - 1)) for j in range(n_steps)]


@torch.no_grad()
def ddim(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, n_steps: int) -> Tensor:
    """Draw (n, size) from noise (n, size). predict: (x_t, steps (n,) int64) -> v, both (n, size)."""
    schedule = Schedule(noise.device)
    steps = respaced(n_steps)
    x = noise

    for step, following in zip(reversed(steps), [*reversed(steps[:-1]), None], strict=True):
        now = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
        velocity = predict(x, now)
        clean = schedule.clean(x, velocity, now)
        if following is None:
            return clean
        x = schedule.signal[following] * clean + schedule.sigma[following] * schedule.noise(x, velocity, now)

    return x
