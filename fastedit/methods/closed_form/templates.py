"""Context templates: prefixes sampled from the model, over which keys and values are averaged."""

from __future__ import annotations

import unicodedata

from fastedit.methods.closed_form.config import TemplateConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.sampling import sample_tokens


def sample_templates(model: ModelAdapter, config: TemplateConfig, seed: int) -> tuple[str, ...]:
    """Context templates: "{}", then one sampled prefix per seed word, each ending in ". {}".

    As in MEMIT's released code: top-k sampling, NFKD normalisation, braces replaced by spaces. Special tokens are
    dropped, which the released code does not do."""
    rows = sample_tokens(model, config.seeds, config.length, config.top_k, seed)
    texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True)
    prefixes = (unicodedata.normalize("NFKD", text).replace("{", " ").replace("}", " ") for text in texts)
    return ("{}", *(f"{prefix.strip()}. {{}}" for prefix in prefixes))
