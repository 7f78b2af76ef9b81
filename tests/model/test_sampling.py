"""Text sampled from the model: lengths, repeatability, and the form of context templates."""

import threading

import pytest
import torch

from fastedit.methods.closed_form.config import TemplateConfig
from fastedit.methods.closed_form.templates import sample_templates
from fastedit.model.sampling import OPENERS, sample_background, sample_tokens

PROMPTS = ["The", "Therefore the", "Because", "I"]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(random_adapter):
    one, two, other = (sample_tokens(random_adapter, PROMPTS, 20, 10, seed) for seed in (3, 3, 4))
    assert one == two
    assert one != other


def test_the_global_random_state_is_left_alone(random_adapter):
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    sample_tokens(random_adapter, PROMPTS, 12, 10, 3)
    sample_templates(random_adapter, TemplateConfig(length=12), 3)
    sample_background(random_adapter, 20, 10, 3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_state_before_does_not_change_what_is_sampled(random_adapter):
    torch.manual_seed(1)
    first = sample_tokens(random_adapter, PROMPTS, 12, 10, 3)
    torch.manual_seed(2)
    assert sample_tokens(random_adapter, PROMPTS, 12, 10, 3) == first


@pytest.mark.parametrize("batch_size", [1, 64])
def test_every_row_begins_with_its_prompt_and_has_the_wanted_length(random_adapter, batch_size):
    made = []
    rows = sample_tokens(random_adapter, PROMPTS, 15, 10, 0, batch_size, made.append)
    prompts = [random_adapter.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert len({len(ids) for ids in prompts}) > 1
    for row, ids in zip(rows, prompts, strict=True):
        assert len(row) == 15
        assert row[: len(ids)] == ids
    assert sum(made) == sum(15 - len(ids) for ids in prompts)


def test_the_end_of_text_is_never_sampled(random_adapter):
    end = random_adapter.tokenizer.eos_token_id
    # A model that says nothing else, if it may.
    random_adapter.model.lm_head.weight.data.zero_()
    random_adapter.model.lm_head.register_forward_hook(lambda m, inputs, logits: logits.index_fill(-1, end_index, 50.0))
    end_index = torch.tensor([end])
    rows = sample_tokens(random_adapter, PROMPTS, 30, 10, 0)
    assert all(end not in row and len(row) == 30 for row in rows)


def test_only_the_top_tokens_are_sampled(random_adapter):
    rows = sample_tokens(random_adapter, PROMPTS, 20, 2, 0)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        start = len(random_adapter.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            best = random_adapter.model(input_ids=torch.tensor([row])).logits[0].topk(2).indices
        for position in range(start, 20):
            assert row[position] in best[position - 1].tolist()


def test_top_one_is_greedy(random_adapter):
    assert sample_tokens(random_adapter, PROMPTS, 20, 1, 0) == sample_tokens(random_adapter, PROMPTS, 20, 1, 1)


def test_a_prompt_that_leaves_no_room_is_named(random_adapter):
    longest = max(len(random_adapter.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    with pytest.raises(ValueError, match=f"'Therefore the' has {longest} tokens, no room in {longest}"):
        sample_tokens(random_adapter, PROMPTS, longest, 10, 0)


def test_templates_are_the_plain_one_and_a_beginning_per_seed(random_adapter):
    config = TemplateConfig(seeds=("The", "Because", "I"), length=12, top_k=10)
    templates = sample_templates(random_adapter, config, 5)
    assert templates[0] == "{}"
    assert len(templates) == 4
    for seed, template in zip(config.seeds, templates[1:], strict=True):
        assert template.startswith(seed)
        assert template.endswith(". {}")
        assert template == template.strip()
    assert templates == sample_templates(random_adapter, config, 5)


def say_only(model, tokenizer, text):
    """Make the model repeat the tokens of `text` whatever it read, in any order."""
    wanted = torch.tensor(sorted(set(tokenizer(text)["input_ids"])))
    hush = torch.full((model.config.vocab_size,), -1e4, dtype=torch.float64)
    hush[wanted] = 0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + hush)


def test_braces_and_special_tokens_do_not_get_into_templates(random_adapter):
    say_only(random_adapter.model, random_adapter.tokenizer, "{ } {} <unused>{<end>")
    plain, *templates = sample_templates(random_adapter, TemplateConfig(length=30, top_k=50), 5)
    rows = sample_tokens(random_adapter, TemplateConfig().seeds, 30, 50, 5)
    assert any("{" in text or "}" in text for text in random_adapter.tokenizer.batch_decode(rows))
    assert plain == "{}"
    for template in templates:
        head = template.removesuffix(". {}")
        assert head != template
        assert "{" not in head
        assert "}" not in head
        assert "<pad>" not in head
        assert template.format("x") == f"{head}. x"


def test_special_tokens_are_dropped_and_characters_decomposed(random_adapter):
    tokenizer = random_adapter.tokenizer
    say_only(random_adapter.model, tokenizer, "<pad><pad>")
    templates = sample_templates(random_adapter, TemplateConfig(seeds=("Ł\u0105",), length=20, top_k=50), 5)
    assert templates == ("{}", "Ła\u0328. {}")


@pytest.mark.parametrize(("n_tokens", "window", "count"), [(40, 16, 3), (48, 16, 3), (1, 8, 1), (520, 16, 33)])
def test_background_is_whole_windows_that_hold_enough_tokens(random_adapter, n_tokens, window, count):
    made = []
    windows = sample_background(random_adapter, n_tokens, window, 0, made.append)
    assert [len(ids) for ids in windows] == [window] * count
    for i, ids in enumerate(windows):
        opener = random_adapter.tokenizer(OPENERS[i % len(OPENERS)])["input_ids"]
        assert ids[: len(opener)] == opener
    assert windows == sample_background(random_adapter, n_tokens, window, 0)


def test_the_samples_are_those_of_the_global_generator(random_adapter):
    """Texts that were sampled with `torch.manual_seed` stay what they were."""
    ids = torch.tensor([random_adapter.tokenizer("The")["input_ids"]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wanted = random_adapter.generate(ids, 20, 10).tolist()
    assert sample_tokens(random_adapter, ["The"], ids.shape[1] + 20, 10, 3) == wanted


def test_another_thread_that_draws_does_not_change_what_is_sampled(random_adapter):
    alone = sample_tokens(random_adapter, PROMPTS, 20, 10, 3)
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.manual_seed(5)
            torch.rand(7)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert all(sample_tokens(random_adapter, PROMPTS, 20, 10, 3) == alone for _ in range(3))
    finally:
        stop.set()
        thread.join()
