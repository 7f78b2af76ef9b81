"""Writing into weights and taking it back: columns, masters, rewinding, trials and undo, all bit for bit."""

import hashlib

import pytest
import torch

from fastedit.editing.committed import CommittedBatches
from fastedit.methods.base import NoState
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet
from fastedit.weights.editable import ColumnWeights, EditableWeights
from fastedit.weights.trial import Trial

LAYERS = (1, 2)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INDEXES = [None, torch.tensor([3, 7, 40]), torch.tensor([], dtype=torch.int64)]


@pytest.fixture(params=[EditableWeights, ColumnWeights], ids=["whole", "columns"])
def kind(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def weights(request, kind, random_llama, random_tokenizer):
    return kind(ModelAdapter(random_llama.to(request.param), random_tokenizer), LAYERS)


def update(index, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    width = 48 if index is None else len(index)
    return torch.randn(2, 32, generator=generator) * size, torch.randn(width, 2, generator=generator)


def bits(weights):
    return [weights.columns(layer, None) for layer in LAYERS]


def same(left, right):
    return all(
        torch.equal(one[0], other[0]) and (one[1] is other[1] is None or torch.equal(one[1], other[1]))
        for one, other in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("index", INDEXES)
def test_add_writes_the_product_into_the_columns_and_nowhere_else(weights, index):
    residual, solution = update(index)
    weights.add(1, index, residual, solution)
    chosen = torch.arange(48) if index is None else index
    wanted = weights.original(1).clone().double()
    wanted[:, chosen] += residual.double().T @ solution.double().T
    found = weights.current(1)
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= 2 * torch.finfo(found.dtype).eps
    others = [column for column in range(48) if column not in chosen]
    assert torch.equal(found[:, others], weights.original(1)[:, others])
    assert torch.equal(weights.current(2), weights.original(2))
    if len(chosen):
        assert not torch.equal(found, weights.original(1))


@pytest.mark.parametrize("index", INDEXES)
def test_restore_puts_columns_back_bit_for_bit(weights, index):
    weights.add(1, None, *update(None, seed=1))
    before = bits(weights)
    saved = weights.columns(1, index)
    weights.add(1, index, *update(index, seed=2))
    assert same(bits(weights), before) is (index is not None and len(index) == 0)
    weights.restore(1, index, saved)
    assert same(bits(weights), before)


def test_restore_leaves_other_columns_alone(weights):
    saved = weights.columns(1, torch.tensor([3]))
    weights.add(1, None, *update(None))
    after = weights.current(1).clone()
    weights.restore(1, torch.tensor([3]), saved)
    assert torch.equal(weights.current(1)[:, 3], weights.original(1)[:, 3])
    assert torch.equal(weights.current(1)[:, 4:], after[:, 4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_half_a_step_add_up_in_the_master(kind, random_llama, random_tokenizer, dtype):
    random_llama.to(dtype).model.layers[1].mlp.down_proj.weight.data.fill_(1.0)
    weights = kind(ModelAdapter(random_llama, random_tokenizer), (1,))
    step = torch.finfo(dtype).eps / 8
    residual, solution = torch.full((1, 32), step), torch.ones(48, 1)
    for _ in range(3):
        weights.add(1, None, residual, solution)
        assert torch.equal(weights.current(1), weights.original(1))
    for _ in range(13):
        weights.add(1, None, residual, solution)
    wanted = torch.full((32, 48), 1 + 16 * step)
    assert torch.equal(weights.current(1), wanted.to(dtype))
    master = weights.columns(1, None)[1]
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, wanted, rtol=0, atol=1e-6)


def test_full_precision_has_no_master(kind, random_adapter):
    assert kind(random_adapter, LAYERS).columns(1, None)[1] is None


@pytest.mark.parametrize("fails", [True, False])
def test_rewound_shows_the_original_weights_and_brings_the_edited_ones_back(weights, fails):
    original = [weights.original(layer).clone() for layer in LAYERS]
    for layer in LAYERS:
        weights.add(layer, None, *update(None))
    before, fingerprint = bits(weights), weights.fingerprint()
    try:
        with weights.rewound():
            for layer, wanted in zip(LAYERS, original, strict=True):
                assert torch.equal(weights.current(layer), wanted)
            assert weights.fingerprint() != fingerprint
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(bits(weights), before)
    assert weights.fingerprint() == fingerprint
    for layer, wanted in zip(LAYERS, original, strict=True):
        weights.add(layer, None, *update(None))
        assert torch.equal(weights.original(layer), wanted)


def test_the_models_own_forward_sees_the_edit_and_the_rewinding(kind, random_adapter):
    weights = kind(random_adapter, LAYERS)
    ids = torch.tensor([[5, 9, 31]])
    with torch.no_grad():
        plain = random_adapter.model(input_ids=ids).logits
        weights.add(1, None, *update(None))
        assert not torch.allclose(random_adapter.model(input_ids=ids).logits, plain)
        with weights.rewound():
            assert torch.equal(random_adapter.model(input_ids=ids).logits, plain)


def test_a_fingerprint_changes_with_any_edited_layer_and_comes_back(weights):
    before = weights.fingerprint()
    for layer in LAYERS:
        saved = weights.columns(layer, None)
        weights.add(layer, torch.tensor([5]), *update(torch.tensor([5])))
        assert weights.fingerprint() != before
        weights.restore(layer, None, saved)
        assert weights.fingerprint() == before


OVERLAPPING = [
    (1, torch.tensor([3, 7])),
    (1, torch.tensor([7, 9, 40])),
    (2, torch.tensor([0])),
    (1, None),
    (1, torch.tensor([3])),
    (2, torch.tensor([0, 1])),
]


def fill(trial, weights, seed=0):
    for step, (layer, index) in enumerate(OVERLAPPING):
        trial.add(layer, index, *update(index, seed=seed + step))


def test_a_trial_that_is_not_committed_leaves_no_bit_changed(weights):
    before = bits(weights)
    with Trial(weights) as trial:
        fill(trial, weights)
        assert not same(bits(weights), before)
    assert same(bits(weights), before)


def test_an_exception_rolls_back_and_goes_on(weights):
    before = bits(weights)

    def interrupted():
        with Trial(weights) as trial:
            fill(trial, weights)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(bits(weights), before)


def test_a_committed_trial_stays_and_undo_takes_it_back(weights):
    committed = CommittedBatches()
    before = bits(weights)
    with Trial(weights) as trial:
        fill(trial, weights)
        during = bits(weights)
        committed.append(EditSet(()), trial, NoState(), {})
    assert same(bits(weights), during)
    assert committed.undoable == 1
    committed.undo(1, NoState())
    assert same(bits(weights), before)
    assert committed.undoable == 0


def test_undo_goes_back_batch_by_batch_as_far_as_the_depth(weights):
    committed = CommittedBatches(undo_depth=2)
    states = [bits(weights)]
    for batch in range(3):
        with Trial(weights) as trial:
            fill(trial, weights, seed=10 * batch)
            committed.append(EditSet(()), trial, NoState(), {})
        states.append(bits(weights))
    assert committed.undoable == 2
    for wanted in (states[2], states[1]):
        committed.undo(1, NoState())
        assert same(bits(weights), wanted)
    with pytest.raises(ValueError, match="0 batches are in memory"):
        committed.undo(1, NoState())
    assert same(bits(weights), states[1])


def test_a_failed_trial_after_a_committed_one_takes_back_only_itself(weights):
    committed = CommittedBatches()
    before = bits(weights)
    with Trial(weights) as first:
        fill(first, weights)
        committed.append(EditSet(()), first, NoState(), {})
    stayed = bits(weights)
    with Trial(weights) as second:
        fill(second, weights, seed=50)
    assert same(bits(weights), stayed)
    assert committed.undoable == 1
    committed.undo(1, NoState())
    assert same(bits(weights), before)


def test_nothing_to_undo_at_the_start(weights):
    with pytest.raises(ValueError, match="0 batches are in memory"):
        CommittedBatches().undo(1, NoState())


def test_only_columns_that_were_written_are_kept(random_llama, random_tokenizer):
    weights = ColumnWeights(ModelAdapter(random_llama.bfloat16(), random_tokenizer), LAYERS)
    for index in (torch.tensor([3, 7]), torch.tensor([7, 9, 40]), torch.tensor([3])):
        weights.add(1, index, *update(index))
    (touched,) = weights._touched.values()
    assert touched.index.tolist() == [3, 7, 9, 40]
    assert touched.original.shape == touched.master.shape == (32, 4)


@pytest.mark.parametrize("index", INDEXES)
def test_a_layer_that_was_never_written_is_saved_without_a_copy(weights, index):
    """Its original is what a trial goes back to, and its own master: the hash counts it as one."""
    saved, master = weights.saved(1, index)
    fingerprint, before = weights.layer_hash(1), bits(weights)
    if isinstance(weights, ColumnWeights):
        assert same([(saved, master)], [weights.columns(1, index)])
    else:
        assert master is None
        assert (saved.data_ptr() == weights.original(1).data_ptr()) is (index is None)

    weights.add(1, index, *update(index, seed=1))
    weights.add(1, None, *update(None, seed=2))
    weights.restore(1, None, before[0])
    weights.add(1, index, *update(index, seed=3))
    weights.restore(1, index, (saved, master))
    assert weights.layer_hash(1) == fingerprint
    assert same(bits(weights), before)
    original = weights.original(1).clone()
    weights.add(1, index, *update(index, seed=4))
    assert torch.equal(weights.original(1), original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_hash_of_an_unwritten_half_weight_counts_its_master(random_llama, random_tokenizer, dtype):
    """Runs recorded by versions that made every master at the start hold this hash."""
    weights = EditableWeights(ModelAdapter(random_llama.to(dtype), random_tokenizer), LAYERS)
    weight = weights.current(1)
    both = hashlib.sha256()
    for part in (weight.view(torch.int16), weight.float().view(torch.int32)):
        both.update(part.contiguous().numpy().tobytes())
    assert weights.layer_hash(1) == both.hexdigest()
    assert not weights._master


def test_a_trial_that_is_undone_leaves_master_and_weight_as_they_were(random_llama, random_tokenizer):
    weights = EditableWeights(ModelAdapter(random_llama.bfloat16(), random_tokenizer), LAYERS)
    before = weights.fingerprint()
    with Trial(weights) as trial:
        trial.add(1, None, *update(None))
        trial.commit()
    first = weights.fingerprint()
    with Trial(weights) as second:
        second.add(1, torch.tensor([3, 7]), *update(torch.tensor([3, 7]), seed=1))
        second.commit()
    second.rollback()
    assert weights.fingerprint() == first
    trial.rollback()
    assert weights.fingerprint() == before != first
