"""The schedule, its conversions, and the sampler with an oracle in place of a network."""

from __future__ import annotations

import pytest
import torch

from fastedit.methods.meg.diffusion import STEPS, Schedule, alpha_bar, ddim, respaced


def test_schedule_ends_where_the_published_one_does() -> None:
    assert float(alpha_bar()[-1]) == pytest.approx(4.036e-5, rel=1e-3)
    assert float(alpha_bar()[0]) == pytest.approx(1 - 1e-4)


def test_respaced_steps() -> None:
    steps = respaced(50)
    assert len(steps) == 50
    assert steps[:5] == [0, 20, 41, 61, 82]
    assert steps[-3:] == [958, 979, 999]
    assert respaced(1) == [999]
    assert respaced(STEPS) == list(range(STEPS))
    with pytest.raises(ValueError, match=r"must lie in 1-1000, got 0"):
        respaced(0)


def test_conversions_round_trip() -> None:
    schedule = Schedule()
    clean, noise = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    steps = torch.linspace(0, STEPS - 1, 40).long()
    noised, velocity = schedule.noised(clean, noise, steps), schedule.velocity(clean, noise, steps)
    torch.testing.assert_close(schedule.clean(noised, velocity, steps), clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(schedule.noise(noised, velocity, steps), noise, rtol=0, atol=1e-5)
    # At the first step nearly all is signal, at the last nearly all is noise.
    torch.testing.assert_close(noised[:1], clean[:1], rtol=0, atol=0.05)
    torch.testing.assert_close(noised[-1:], noise[-1:], rtol=0, atol=0.05)


@pytest.mark.parametrize("n_steps", [1, 50])
def test_an_oracle_is_followed_home(n_steps: int) -> None:
    schedule = Schedule()
    clean, noise = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))

    def oracle(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        remaining = (x - schedule.signal[steps, None] * clean) / schedule.sigma[steps, None]
        return schedule.velocity(clean, remaining, steps)

    torch.testing.assert_close(ddim(oracle, noise, n_steps), clean, rtol=0, atol=2e-3)
    # An oracle that errs at one step alone, the last, is off by S there; the others would mend it.
    wrong = ddim(lambda x, steps: oracle(x, steps) + 1.0, noise, n_steps)
    assert (wrong - clean).abs().max() > 5e-3
