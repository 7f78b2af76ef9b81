"""select_neurons against the rules as slow loops over Python numbers."""

from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastedit.ops.select_neurons import select_neurons, select_neurons_ref
from fastedit.testing import CASES, Case, Factory, assert_same_indices, strided

LISTS = st.one_of(
    st.lists(st.integers(0, 4).map(float), min_size=1, max_size=12),
    st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=40),
)
SHARES = st.one_of(st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]), st.floats(1e-6, 1))


def in_order(scores):
    return sorted(range(len(scores)), key=lambda neuron: (-scores[neuron], neuron))


def chosen(scores, rule, value):
    """The three rules, one neuron at a time."""
    order = in_order(scores)
    if rule == "top_k":
        return sorted(order[:value])
    if value == 1:
        return list(range(len(scores)))
    total = 0.0
    for neuron in order:
        total += scores[neuron]
    taken, summed = [], 0.0
    for neuron in order:
        if rule == "reaching" and taken and summed >= value * total:
            break
        if rule == "within" and taken and summed + scores[neuron] > value * total:
            break
        taken.append(neuron)
        summed += scores[neuron]
    return sorted(taken)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("rule", [("top_k", 0.3), ("reaching", 0.65), ("within", 0.65)], ids=lambda rule: rule[0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_indices_are_those_of_the_loop(case, rule, ties, backend, device):
    score = Factory(case, device=device).score(ties)
    name, value = rule
    value = max(1, int(value * case.d_ff)) if name == "top_k" else value
    assert_same_indices(select_neurons(score, **{name: value}), chosen(score.tolist(), name, value), "select_neurons")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_other_dtypes_are_compared_as_they_are(dtype, backend, device):
    score = Factory(Case("odd", 1, 61), dtype, device).score()
    for name, value in (("top_k", 9), ("reaching", 0.5), ("within", 0.5)):
        assert_same_indices(
            select_neurons(score, **{name: value}), chosen(score.tolist(), name, value), "select_neurons"
        )


def decided_by_rounding(scores, share):
    """Whether some prefix sum lies so near its bound, without being equal, that the order of a float64 sum decides."""
    exact = [Fraction(scores[neuron]) for neuron in in_order(scores)]
    bound = Fraction(share) * sum(exact)
    rounding = len(exact) * Fraction(2) ** -52 * sum(exact)
    return any(0 < abs(prefix - bound) <= rounding for prefix in accumulate(exact))


def test_a_bound_within_rounding_is_noticed():
    # Found by a draw: in one order of the sum the bound is the whole mass, in another one it is less.
    assert decided_by_rounding([0.0, 7.580988304876593e-25, 1e-36, 1e-36], 0.9999999999999999)
    assert not decided_by_rounding([3.0, 2.0, 1.0], 0.5)
    assert not decided_by_rounding([3.0, 2.0, 1.0], 0.65)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=LISTS, share=SHARES, rule=st.sampled_from(["reaching", "within"]))
def test_a_share_of_the_mass_takes_the_prefix_of_the_loop(scores, share, rule, backend):
    assume(not decided_by_rounding(scores, share))
    found = select_neurons(torch.tensor(scores), **{rule: share})
    assert_same_indices(found, chosen(scores, rule, share), "select_neurons")


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=LISTS, part=st.floats(0, 1), sign=st.sampled_from([1.0, -1.0]))
def test_top_k_takes_the_first_k_of_either_sign(scores, part, sign, backend):
    scores = [sign * score for score in scores]
    k = max(1, round(part * len(scores)))
    assert_same_indices(select_neurons(torch.tensor(scores), top_k=k), chosen(scores, "top_k", k), "select_neurons")


@pytest.mark.parametrize(
    ("scores", "rule", "expected"),
    [
        pytest.param([1, 3, 3, 3, 0], {"top_k": 2}, [1, 2], id="first_of_equals"),
        pytest.param([0.0, -0.0, 0.0], {"top_k": 2}, [0, 1], id="both_zeros_are_equal"),
        pytest.param([1, 1, 1, 1], {"reaching": 0.5}, [0, 1], id="reaching_at_the_bound"),
        pytest.param([1, 1, 1, 1], {"reaching": 0.51}, [0, 1, 2], id="reaching_past_the_bound"),
        pytest.param([1, 1, 1, 1], {"within": 0.5}, [0, 1], id="within_at_the_bound"),
        pytest.param([1, 1, 1, 1], {"within": 0.74}, [0, 1], id="within_below_the_bound"),
        pytest.param([1, 2, 9, 1], {"within": 0.1}, [2], id="within_takes_one_at_least"),
        pytest.param([2, 0, 5, 0], {"reaching": 1}, [0, 1, 2, 3], id="reaching_everything"),
        pytest.param([2, 0, 5, 0], {"within": 1.0}, [0, 1, 2, 3], id="within_everything"),
        pytest.param([0, 0, 0], {"reaching": 0.5}, [0], id="no_mass_to_reach"),
        # In float32 the ones would vanish beside 2^26.
        pytest.param([2**26] + [1] * 8, {"reaching": (2**26 + 4) / (2**26 + 8)}, [0, 1, 2, 3, 4], id="wide_reaching"),
        pytest.param([2**26] + [1] * 8, {"within": (2**26 + 4.5) / (2**26 + 8)}, [0, 1, 2, 3, 4], id="wide_within"),
    ],
)
def test_worked_examples(scores, rule, expected, backend):
    score = torch.tensor(scores, dtype=torch.float32)
    for found in (select_neurons(score, **rule), select_neurons(strided(score), **rule)):
        assert_same_indices(found, expected, "select_neurons")
    assert_same_indices(select_neurons_ref(score, **rule), expected, "select_neurons")


def test_ties_across_a_wide_layer_go_to_the_smallest_indices(backend):
    score = torch.zeros(1536)
    score[700:] = 1.0
    assert_same_indices(select_neurons(score, top_k=5), range(700, 705), "select_neurons")
    assert_same_indices(select_neurons(score, reaching=0.25), range(700, 909), "select_neurons")


def test_the_yardstick_refuses_what_is_not_the_exact_list():
    found = torch.tensor([1, 4, 6])
    assert_same_indices(found, [1, 4, 6], "select_neurons")
    for wrong in (found.flip(0), found[:2], torch.tensor([1, 4, 5]), torch.zeros_like(found), found.int(), found[:0]):
        with pytest.raises(AssertionError, match="select_neurons"):
            assert_same_indices(wrong, [1, 4, 6], "select_neurons")


def test_the_scores_are_left_alone(backend, device):
    score = Factory(Case("odd", 1, 61), device=device).score()
    before = score.clone()
    select_neurons(score, reaching=0.5)
    assert torch.equal(score, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", [{"top_k": 1}, {"reaching": 0.5}, {"within": 1.0}], ids=lambda rule: next(iter(rule)))
def test_scores_that_are_not_finite_are_an_error(rule, bad):
    with pytest.raises(ValueError, match="select_neurons: scores must be finite, got 2 NaN or Inf of 4"):
        select_neurons(torch.tensor([1.0, bad, 2.0, bad]), **rule)


@pytest.mark.parametrize(
    ("score", "rule", "wanted"),
    [
        pytest.param([[1.0]], {"top_k": 1}, r"score must be \(any\), got \(1, 1\)", id="score_2d"),
        pytest.param([1.0, 2.0], {}, "exactly one of", id="no_rule"),
        pytest.param([1.0, 2.0], {"top_k": 1, "within": 0.5}, "exactly one of", id="two_rules"),
        pytest.param([1.0, 2.0], {"top_k": 0}, r"top_k must be in \[1, 2\], got 0", id="k_zero"),
        pytest.param([1.0, 2.0], {"top_k": 3}, r"top_k must be in \[1, 2\], got 3", id="k_too_large"),
        pytest.param([], {"top_k": 1}, r"top_k must be in \[1, 0\], got 1", id="no_scores"),
        pytest.param([1.0, 2.0], {"reaching": 0.0}, r"share must be in \(0, 1\], got 0.0", id="share_zero"),
        pytest.param([1.0, 2.0], {"within": 1.1}, r"share must be in \(0, 1\], got 1.1", id="share_above_one"),
        pytest.param([1.0, 2.0], {"within": float("nan")}, r"share must be in \(0, 1\], got nan", id="share_nan"),
        pytest.param([1.0, -2.0], {"reaching": 0.5}, "must not be negative", id="negative_mass"),
    ],
)
def test_wrong_arguments_are_named(score, rule, wanted):
    with pytest.raises(ValueError, match=f"select_neurons: .*{wanted}"):
        select_neurons(torch.tensor(score), **rule)
