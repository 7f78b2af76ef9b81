"""Packed rows: attention plans against dense attention, the adapter and the passes against the model's own forward."""

import pytest
import torch
import transformers

from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import UnsupportedModel
from fastedit.model.packed_attention import CausalPlan, Rotary, plan_live, plan_sequences
from fastedit.model.packed_passes import RowTree, TreePass, live_rows
from fastedit.model.tokens import TokenSequence

CLOSE = 1e-10
SCALE = 0.3
HEADS = [(4, 4), (4, 2), (6, 1)]

TREES = {
    "shared beginnings": [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 7], [8, 9]],
    "one is the beginning of another": [[1, 2, 3], [1, 2], [1], [1, 2, 3]],
    "same token after another past": [[1, 2, 3], [4, 2, 3], [1, 5, 3]],
    "single rows": [[1], [2], [3]],
    "one sequence": [[1, 2, 3, 4, 5]],
}


def dense(query, key, value, visible, softcap=None):
    """(n_heads, n_query, head_dim) attending to (n_kv_heads, n_key, head_dim) where visible (n_query, n_key)."""
    share = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(share, 0), value.repeat_interleave(share, 0)
    scores = query @ key.transpose(1, 2) * SCALE
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value


def causal(n_query, n_key):
    """The last n_query of n_key positions, each seeing itself and what is before it."""
    return torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)


def random_rows(n_heads, n_kv, n_rows, head_dim=8, **options):
    generator = torch.Generator().manual_seed(n_heads * 100 + n_rows)
    return [
        torch.randn(1, heads, n_rows, head_dim, generator=generator, dtype=torch.float64, **options)
        for heads in (n_heads, n_kv, n_kv)
    ]


@pytest.mark.parametrize(("n_heads", "n_kv"), HEADS)
@pytest.mark.parametrize("name", TREES)
def test_rows_of_a_tree_attend_to_their_ancestors(name, n_heads, n_kv):
    tree = RowTree(TREES[name])
    query, key, value = random_rows(n_heads, n_kv, tree.n_rows)
    found = tree.plan()(0, query, key, value, SCALE)[0]
    for path in tree.paths:
        wanted = dense(query[0][:, path], key[0][:, path], value[0][:, path], causal(len(path), len(path)))
        torch.testing.assert_close(found[path], wanted.transpose(0, 1), rtol=0, atol=CLOSE)


def test_a_sequence_that_owns_no_row_is_left_out_of_the_plan():
    plan = plan_sequences([[0, 1, 2], []], [[0, 1, 2], [0, 1]], 3)
    assert plan.query_index.tolist() == [[0, 1, 2]]
    assert plan.mask.tolist() == [[[True, False, False], [True, True, False], [True, True, True]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_keeps_the_dtype_of_the_rows(dtype):
    tree = RowTree(TREES["shared beginnings"])
    parts = random_rows(4, 2, tree.n_rows)
    wanted = tree.plan()(0, *parts, SCALE)
    found = tree.plan()(0, *(part.to(dtype) for part in parts), SCALE)
    assert found.dtype == dtype
    assert float((found.double() - wanted).abs().max()) < 20 * torch.finfo(dtype).eps


def test_keep_collects_the_keys_and_values_of_a_layer():
    tree = RowTree(TREES["shared beginnings"])
    query, key, value = random_rows(4, 2, tree.n_rows)
    plan = tree.plan()
    plan.keep = {}
    plan(3, query, key, value, SCALE)
    assert list(plan.keep) == [3]
    assert torch.equal(plan.keep[3][0], key[0])
    assert torch.equal(plan.keep[3][1], value[0])


def test_no_gradient_goes_through_a_tree_plan():
    tree = RowTree(TREES["shared beginnings"])
    parts = random_rows(4, 2, tree.n_rows, requires_grad=True)
    mixed = tree.plan()(0, *parts, SCALE)
    with pytest.raises(RuntimeError, match="live plan"):
        mixed.sum().backward()


LIVE = {
    "ragged": ([3, 1, 4], [2, 5, 1]),
    "some without a prefix": ([2, 3, 1], [0, 4, 0]),
    "all single rows": ([1, 1, 1, 1], [3, 3, 1, 2]),
    "one sequence": ([5], [2]),
    "no prefixes": ([2, 4], [0, 0]),
}


def prefix_states(prefix_lengths, n_kv, head_dim=8):
    """Per sequence (n_kv, length, head_dim) keys and values, and both padded and flattened as a plan wants them.

    The padding is large: a padded place that is seen shows."""
    generator = torch.Generator().manual_seed(5)
    each = [
        [torch.randn(n_kv, length, head_dim, generator=generator, dtype=torch.float64) for _ in range(2)]
        for length in prefix_lengths
    ]
    width = max(prefix_lengths)
    packed = [torch.full((n_kv, len(each), width, head_dim), 30.0, dtype=torch.float64) for _ in range(2)]
    for s, parts in enumerate(each):
        for part, whole in zip(parts, packed, strict=True):
            whole[:, s, : part.shape[1]] = part
    return each, tuple(whole.flatten(0, 1) for whole in packed)


@pytest.mark.parametrize(("n_heads", "n_kv"), HEADS)
@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_live_rows_and_their_gradients_are_those_of_dense_attention(name, n_heads, n_kv, softcap):
    lengths, prefix_lengths = LIVE[name]
    parts = random_rows(n_heads, n_kv, sum(lengths), requires_grad=True)
    each, packed = prefix_states(prefix_lengths, n_kv)
    plan = plan_live(lengths, prefix_lengths, {7: packed} if max(prefix_lengths) else None)
    found = plan(7, *parts, SCALE, softcap)[0]

    wanted, start = [], 0
    for length, before, (prefix_key, prefix_value) in zip(lengths, prefix_lengths, each, strict=True):
        query, key, value = (part[0][:, start : start + length] for part in parts)
        key, value = torch.cat([prefix_key, key], 1), torch.cat([prefix_value, value], 1)
        wanted.append(dense(query, key, value, causal(length, before + length), softcap).transpose(0, 1))
        start += length
    expected = torch.cat(wanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)

    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), parts) for out in (found, expected)]
    for ours, autograd in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=0, atol=10 * CLOSE)


@pytest.mark.parametrize(("n_heads", "n_kv"), HEADS)
@pytest.mark.parametrize(("n_sequences", "length"), [(3, 5), (1, 1), (4, 1), (1, 6)])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_whole_sequences_end_to_end_are_causal(n_sequences, length, n_heads, n_kv, softcap):
    query, key, value = random_rows(n_heads, n_kv, n_sequences * length)
    found = CausalPlan(length)(0, query, key, value, SCALE, softcap)[0]
    for s in range(n_sequences):
        rows = slice(s * length, (s + 1) * length)
        wanted = dense(query[0][:, rows], key[0][:, rows], value[0][:, rows], causal(length, length), softcap)
        torch.testing.assert_close(found[rows], wanted.transpose(0, 1), rtol=0, atol=1e-12)


def test_a_cap_changes_what_comes_out():
    tree = RowTree(TREES["one sequence"])
    parts = random_rows(4, 2, tree.n_rows)
    plain, capped = (tree.plan()(0, *parts, SCALE, softcap) for softcap in (None, 0.7))
    assert float((plain - capped).abs().max()) > 1e-2


def test_a_plan_is_moved_once_and_shares_its_prefix_and_what_it_keeps():
    plan = plan_live([2, 3], [1, 2], {4: (torch.zeros(2, 2, 8), torch.ones(2, 2, 8))})
    elsewhere = torch.device("meta")
    moved = plan.to(elsewhere)
    assert plan.to(torch.device("cpu")) is plan
    assert plan.to(elsewhere) is moved is moved.to(elsewhere)
    assert {part.device for part in (moved.query_index, moved.output_index, moved.mask)} == {elsewhere}
    assert moved.key_index is moved.query_index
    assert moved.prefix is plan.prefix
    kept = {}
    collecting = plan.collecting(kept)
    assert collecting.keep is collecting.to(elsewhere).keep is kept
    assert plan.keep is None
    tree = RowTree(TREES["shared beginnings"]).plan().to(elsewhere)
    assert tree.key_index is not tree.query_index
    assert CausalPlan(3).to(elsewhere) == CausalPlan(3)


def test_rotary_tables_are_found_by_type_of_layer_and_moved_once():
    tables = {kind: (torch.rand(1, 3, 4), torch.rand(1, 3, 4)) for kind in ("local", "global")}
    rotary, here, elsewhere = Rotary(tables), torch.device("cpu"), torch.device("meta")
    for kind, table in tables.items():
        assert rotary.at(kind, here) == table
        assert rotary.at(kind, elsewhere) is rotary.at(kind, elsewhere)
        assert {part.device for part in rotary.at(kind, elsewhere)} == {elsewhere}
    assert Rotary({}).at("", here) is None


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def made(name, **changes):
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_an_unknown_activation_and_a_slow_tokenizer_are_refused(random_llama, random_tokenizer):
    with pytest.raises(UnsupportedModel, match="fast tokenizer"):
        ModelAdapter(random_llama, object())
    random_llama.config.hidden_act = "mish"
    with pytest.raises(UnsupportedModel, match=r"'mish'.*known: silu"):
        ModelAdapter(random_llama, random_tokenizer)


def scale_logits(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.1)


def test_a_forward_that_structure_does_not_show_is_refused(random_tokenizer):
    model = made("Llama")
    scale_logits(model)
    with pytest.raises(UnsupportedModel, match="its forward differs"):
        ModelAdapter(model, random_tokenizer).check_forward()


def test_nothing_longer_than_a_sliding_window_is_taken(random_tokenizer):
    model = made("Mistral")
    model.config.sliding_window = 4
    adapter = ModelAdapter(model, random_tokenizer)
    adapter.check_forward()
    assert adapter.max_positions == 4


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_packed_leaves_the_model_as_it_was(random_adapter, training, fails):
    model = random_adapter.model.train(training)
    model.lm_head.weight.requires_grad_(False)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    attention = model.config._attn_implementation
    try:
        with random_adapter.packed():
            assert model.config._attn_implementation != attention
            assert not any(part.training for part in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            if fails:
                raise Interrupted
    except Interrupted:
        assert fails
    assert model.config._attn_implementation == attention
    assert all(part.training is training for part in model.modules())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == learning


def own_forward(model, ids, layer):
    """(hidden states, input of the layer's down-projection, logits) of one sequence, by the model itself."""
    seen = []
    hook = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    hook.remove()
    return [hidden[0] for hidden in out.hidden_states], seen[0][0], out.logits[0]


SEQUENCES = [[5, 9, 31, 7, 12], [5, 9, 31, 8], [5, 9], [70, 5, 9, 31]]


def test_keys_are_the_very_input_of_the_down_projection(random_adapter):
    with torch.no_grad(), random_adapter.packed():
        below = TreePass.start(random_adapter, SEQUENCES).run(random_adapter, range(2))
        mixed = random_adapter.mix(2, below.rows, below.plan, below.rotary)
        rows, keys = random_adapter.feed_forward_with_keys(2, mixed)
    for ids, path in zip(SEQUENCES, below.tree.paths, strict=True):
        hidden, wanted, _ = own_forward(random_adapter.model, ids, 2)
        torch.testing.assert_close(keys[path], wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(rows[path], hidden[3], rtol=0, atol=1e-5)
    assert not random_adapter.layers[2].mlp.down_proj._forward_pre_hooks


@pytest.mark.parametrize("sequences", [*TREES.values(), SEQUENCES])
def test_a_tree_holds_every_beginning_once(sequences):
    tree = RowTree(sequences)
    beginnings = {tuple(ids[: i + 1]) for ids in sequences for i in range(len(ids))}
    assert tree.n_rows == len(beginnings) == len(tree.token_ids)
    for ids, path in zip(sequences, tree.paths, strict=True):
        assert tree.token_ids[path].tolist() == ids
        assert tree.positions[path].tolist() == list(range(len(ids)))
    for one, path in zip(sequences, tree.paths, strict=True):
        for other, second in zip(sequences, tree.paths, strict=True):
            same = [one[: i + 1] == other[: i + 1] for i in range(min(len(one), len(other)))]
            assert [a == b for a, b in zip(path, second, strict=False)] == same


def test_a_tree_pass_gives_the_models_hidden_states_and_a_subset_its_rows(random_adapter):
    with torch.no_grad(), random_adapter.packed():
        half = TreePass.start(random_adapter, SEQUENCES).run(random_adapter, range(2))
        whole = half.run(random_adapter, range(2, 3))
        short = [SEQUENCES[3][:3], SEQUENCES[0][:4], SEQUENCES[1]]
        part = half.subset(random_adapter, short, [3, 0, 1]).run(random_adapter, range(2, 3))
    for ids, path in zip(SEQUENCES, whole.tree.paths, strict=True):
        hidden, _, _ = own_forward(random_adapter.model, ids, 0)
        torch.testing.assert_close(half.rows[path], hidden[2], rtol=0, atol=1e-5)
        torch.testing.assert_close(whole.rows[path], hidden[3], rtol=0, atol=1e-5)
    for path, source in zip(part.tree.paths, [3, 0, 1], strict=True):
        wanted = whole.rows[whole.tree.paths[source][: len(path)]]
        torch.testing.assert_close(part.rows[path], wanted, rtol=0, atol=1e-5)


SCORED = [
    TokenSequence((5, 9, 31, 7, 12), 2, (3, 4), (1, 2)),
    TokenSequence((5, 9, 31, 8), 0, (0, 2, 3), (1, 2, 3)),
    TokenSequence((70, 5, 9, 31, 6, 44, 3), 5, (6,), (1,)),
    TokenSequence((5, 9), 1, (1,), (1,)),
]
ALL_FIRST = [TokenSequence((5, 9, 31), 0, (1, 2), (1, 2)), TokenSequence((8,), 0, (0,), (1,))]


def changed_forward(model, sequence, layer, change):
    """Final normed hidden states when `change` is added after `layer` at the lookup token, (length, d_model)."""

    def add(module, inputs, output):
        return output.index_add(1, torch.tensor([sequence.lookup]), change[None, None])

    hook = model.model.layers[layer].register_forward_hook(add)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0]
    hook.remove()
    return hidden


@pytest.mark.parametrize("size", [0.0, 1.0])
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("sequences", [SCORED, ALL_FIRST])
def test_live_rows_give_the_changed_models_hidden_states(random_adapter, sequences, layer, size):
    change = size * torch.randn(len(sequences), 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(), random_adapter.packed():
        live, hidden = live_rows(random_adapter, sequences, layer)
        found = live.run(random_adapter, change)
    wanted = [
        changed_forward(random_adapter.model, sequence, layer, row)[list(sequence.scored)]
        for sequence, row in zip(sequences, change, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)
    for row, sequence in zip(hidden, sequences, strict=True):
        states, _, _ = own_forward(random_adapter.model, list(sequence.ids), 0)
        # What transformers reports after the last layer has been through the final norm.
        if layer < 3:
            torch.testing.assert_close(row, states[layer + 1][sequence.lookup], rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", [[0, 2], [3], [1], [0, 1, 2, 3]])
def test_a_selection_is_what_the_kept_sequences_alone_give(random_adapter, keep):
    change = torch.randn(len(SCORED), 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad(), random_adapter.packed():
        selected = live_rows(random_adapter, SCORED, 1)[0].select(random_adapter, keep)
        alone = live_rows(random_adapter, [SCORED[s] for s in keep], 1)[0]
        ours, wanted = (live.run(random_adapter, change[keep]) for live in (selected, alone))
    for name in ("lengths", "prefix_lengths", "scored_counts"):
        assert getattr(selected, name) == getattr(alone, name)
    for name in ("positions", "lookup", "scored"):
        assert torch.equal(getattr(selected, name), getattr(alone, name))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
