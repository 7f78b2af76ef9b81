"""Context templates: beginnings sampled from the model, over which keys and values are averaged."""

from __future__ import annotations

import unicodedata

from fastedit.methods.closed_form.config import TemplateConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.sampling import sample_tokens


def sample_templates(model: ModelAdapter, config: TemplateConfig, seed: int) -> tuple[str, ...]:
    """Context templates: "{}" and one sampled beginning per seed word, each ending in ". {}".

    As in MEMIT: top-k sampling, NFKD, braces blanked. Special tokens are dropped, which the released code forgets."""
    rows = sample_tokens(model, config.seeds, config.length, config.top_k, seed)
    texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True)
    clean = (unicodedata.normalize("NFKD", text).replace("{", " ").replace("}", " ") for text in texts)
    return ("{}", *(f"{text.strip()}. {{}}" for text in clean))
