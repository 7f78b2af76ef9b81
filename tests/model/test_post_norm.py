"""A change of the hidden state carried back through the norm behind a down-projection, against the norm itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fastedit.methods.closed_form.keys import KeySweep
from fastedit.model.adapter import ModelAdapter
from fastedit.model.packed_passes import ValueSite
from fastedit.model.post_norm import PostNorm
from fastedit.records.edit import Edit

LAYER = 1
FAMILIES = ("gemma2", "gemma3", "gemma3 with images", "opt-350m")
EDITS = [Edit(prompt="The twin of Tavisk is", subject="Tavisk", target_new="Pell")]

pytestmark = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def frozen(family_adapter: ModelAdapter) -> None:
    family_adapter.model.requires_grad_(False)


def rows(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))


def site() -> ValueSite:
    return ValueSite(rows(1), rows(2, 0.3))


def undamped(adapter: ModelAdapter) -> PostNorm:
    return replace(PostNorm.of(adapter, LAYER), damping=0.0)


def own_norm(adapter: ModelAdapter) -> torch.nn.Module:
    part = adapter.family.ffn_out_norm or adapter.family.output_norm
    return adapter.layers[LAYER].get_submodule(part)


@torch.no_grad()
def hidden(adapter: ModelAdapter, at: ValueSite) -> torch.Tensor:
    """The hidden state after the layer, in float64."""
    exact = copy.deepcopy(adapter.model).double()
    return ModelAdapter(exact, adapter.tokenizer).join(LAYER, at.residual.double(), at.output.double())


@torch.no_grad()
def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gain_is_read_off_the_norm(family_adapter: ModelAdapter, dtype: torch.dtype) -> None:
    weight = own_norm(family_adapter).weight.detach()
    wanted = 1 + weight if "gemma" in family_adapter.family.name else weight
    family_adapter.model.to(dtype)
    found = PostNorm.of(family_adapter, LAYER)
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    assert error(found.gain, wanted) < bound
    assert error(found.gain, weight + 0.05) > bound
    assert found.centred == found.of_sum == (family_adapter.family.name == "opt-350m")


def test_what_is_missing_is_the_difference_of_two_hidden_states(family_adapter: ModelAdapter) -> None:
    wanted = ValueSite(rows(3), rows(4, 0.3))
    found = PostNorm.of(family_adapter, LAYER).missing(wanted, site())
    assert error(found, hidden(family_adapter, wanted) - hidden(family_adapter, site())) < 1e-5


def test_a_change_that_the_norm_can_make_is_made_exactly(family_adapter: ModelAdapter) -> None:
    present, norm = site(), undamped(family_adapter)
    moved = ValueSite(present.residual, present.output + rows(5, 0.5))
    change = hidden(family_adapter, moved) - hidden(family_adapter, present)

    def made(by: PostNorm) -> torch.Tensor:
        carried = ValueSite(present.residual, present.output + by.carried(present, change.float()))
        return hidden(family_adapter, carried) - hidden(family_adapter, present)

    # The small term under the root of the norm is left out of the scale.
    assert error(made(norm), change) < 1e-4
    assert error(made(replace(norm, gain=1.01 * norm.gain)), change) > 1e-3
    assert error(made(replace(norm, of_sum=not norm.of_sum)), change) > 1e-2


def test_any_change_is_made_to_first_order_but_for_the_length(family_adapter: ModelAdapter) -> None:
    """Against the Jacobian of the layer's own end: the error falls with the square of the size."""
    present, norm, change = site(), undamped(family_adapter), rows(6)
    exact = ModelAdapter(copy.deepcopy(family_adapter.model).double(), family_adapter.tokenizer)
    stream, output = (part.double() for part in present)

    carried = norm.carried(present, change).double()
    _, turned = torch.autograd.functional.jvp(lambda o: exact.join(LAYER, stream, o), output, carried)
    unit = norm._unit(norm._input(present)).double()
    wanted = change.double() / norm.gain
    wanted = wanted - unit * (wanted * unit).mean(1, keepdim=True)
    wanted = norm.gain * (wanted - wanted.mean(1, keepdim=True) if norm.centred else wanted)
    assert error(turned, wanted) < 1e-4
    assert error(turned, change.double()) > 1e-2

    errors = []
    for size in (0.1, 0.01, 0.001):
        now = ValueSite(present.residual, present.output + norm.carried(present, size * change))
        moved = hidden(exact, now) - hidden(exact, present)
        errors.append(float((moved - size * wanted).norm()))
    assert errors[1] < 0.02 * errors[0]
    assert errors[2] < 0.05 * errors[1]


def test_where_the_gain_is_next_to_nothing_little_is_asked_for(family_adapter: ModelAdapter) -> None:
    found = PostNorm.of(family_adapter, LAYER)
    gain = found.gain.clone()
    gain[:2] = torch.tensor([0.0, 1e-6])
    dead, present, change = replace(found, gain=gain, centred=False), site(), rows(7)
    carried = dead.carried(present, change)
    assert float(carried[:, :2].abs().max()) < 1e-4
    assert float(replace(dead, damping=0.0).carried(present, change)[:, 1].abs().max()) > 1e3

    # The least-squares solution: where g y falls short of the change, mu y is what holds it back.
    y = found._divided(change)
    mu = found.damping * found.gain.square().median()
    torch.testing.assert_close(found.gain * (change - found.gain * y), mu * y)


def test_all_is_written_at_the_start_and_nothing_at_the_end(family_adapter: ModelAdapter) -> None:
    norm, start = PostNorm.of(family_adapter, LAYER), site()
    wanted = ValueSite(start.residual, start.output + rows(8, 0.6))
    whole = norm.completed(start, wanted, start)
    # Where the mean is taken off, it is not written either.
    assert error(whole, norm._centre(wanted.output - start.output)) < 1e-5
    assert float(norm.completed(start, wanted, wanted).norm()) < 1e-5 * float(whole.norm())


def test_what_the_stream_has_gained_is_not_written_again(family_adapter: ModelAdapter) -> None:
    """Half of the way is in the stream already. What is left then falls with the square of the size; without a look at
    the stream it would be as long as what is there already."""
    norm, start = undamped(family_adapter), site()
    left, blind = [], []
    for size in (0.1, 0.01):
        wanted = ValueSite(start.residual, start.output + rows(9, size))
        part = norm.missing(wanted, start)
        half = norm.missing(ValueSite(start.residual, (start.output + wanted.output) / 2), start)
        present = ValueSite(start.residual + half, start.output)

        done = ValueSite(present.residual, present.output + norm.completed(start, wanted, present))
        left.append(float(norm.missing(wanted, done).norm()))
        blind.append(error(norm.missing(wanted, ValueSite(present.residual, wanted.output)), part))
    assert left[1] < (1e-4 if norm.of_sum else 0.02 * left[0])
    assert min(blind) > 0.2


def test_layers_behind_two_norms_are_refused(family_adapter: ModelAdapter) -> None:
    family_adapter.check_layers((0, LAYER))
    norm = family_adapter.family.ffn_out_norm or family_adapter.family.output_norm
    row = replace(family_adapter.family, ffn_out_norm=norm, output_norm=norm)
    twice = ModelAdapter(family_adapter.model, family_adapter.tokenizer, (row,))
    twice.check_layers((LAYER,))
    with pytest.raises(ValueError, match=rf"norms at {norm} and at {norm}.*wanted one layer, got \[0, 1\]"):
        KeySweep(twice, EDITS, ["{}"], (0, LAYER))
