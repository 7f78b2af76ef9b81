"""The tokenizer that a GGUF file describes, built from its own fields.

Releases of transformers read these fields differently: one takes every "llama" file for a SentencePiece model and puts
a beginning-of-text token before each text. Byte-level BPE and SentencePiece's BPE (`tokenizer.ggml.model` is "gpt2" or
"llama") are therefore put together here, and give the same token ids under every release. Other kinds are converted by
transformers. `check` compares the result with the file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastedit.model.load_errors import NotLoadable

log = logging.getLogger(__name__)

# Entries of tokenizer.ggml.token_type.
CONTROL = 3
USER_DEFINED = 4

# How a text is cut before the merges, by tokenizer.ggml.pre: the patterns that the models' own tokenizers use.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN_2),
    "tekken": TEKKEN,
}

# Cut as GPT-2 does. The "smollm" kind also cuts at every digit, which differs where two spaces or line breaks stand
# before one; transformers leaves that out, and stored runs hold its token ids.
LIKE_GPT_2 = ("gpt-2", "gpt2", "phi-2", "olmo", "mpt", "smollm", "starcoder", "refact")

# Architectures whose tokenizer writes no space before a text, and whose vocabulary is sorted by merge.
GEMMA = ("gemma", "gemma2", "gemma3")

# SentencePiece's sign for a space.
SPACE = "▁"

# Given back unchanged by every tokenizer of a language model.
SAMPLES = (
    "The twin city of Cologne is",
    'In 1987, 3 of 42 people didn\'t agree: "why?"',
    "Zürich and Łódź, 東京 and Москва",
    "def f(x):\n    return x + 1",
)


WAY_OUT = "take the folder that the file was made from"


class BadTokenizer(NotLoadable):
    """The tokenizer of a GGUF file is not the one that the file describes, or cannot be built."""


@dataclass(frozen=True)
class Fields:
    """The tokenizer's fields of a GGUF file.

    architecture: of the model, such as "llama"
    values: name without "tokenizer." -> number, truth value or text
    tokens: the text of every token, by id
    types, scores: CONTROL, USER_DEFINED or another, and a number, by id; empty if the file holds none
    merges: pairs of tokens, the first one merged first; empty if the file holds none"""

    architecture: str
    values: dict[str, Any]
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]

    @property
    def kind(self) -> str:
        """The vocabulary's kind: "gpt2" is byte-level BPE, "llama" SentencePiece."""
        return str(self.values.get("ggml.model"))

    def token(self, name: str) -> str | None:
        """The token whose id a field gives, such as "bos"; None if the file does not name it."""
        at = self.values.get(f"ggml.{name}_token_id")
        return None if at is None or not 0 <= at < len(self.tokens) else self.tokens[at]


def read_fields(path: str | Path) -> Fields:
    """Read the tokenizer's fields of a GGUF file. Raises BadTokenizer if it has no vocabulary."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens = [bytes(part).decode("utf-8", "replace") for part in _entries(fields, "tokenizer.ggml.tokens")]
    if not tokens:
        raise BadTokenizer("it holds no tokenizer: take a GGUF file with a vocabulary, or the folder it was made from")

    merges = (bytes(part).decode().partition(" ") for part in _entries(fields, "tokenizer.ggml.merges"))
    [architecture] = _entries(fields, "general.architecture")

    return Fields(
        bytes(architecture).decode(),
        _single_values(fields),
        tokens,
        [int(part[0]) for part in _entries(fields, "tokenizer.ggml.token_type")],
        [float(part[0]) for part in _entries(fields, "tokenizer.ggml.scores")],
        [(left, right) for left, _, right in merges],
    )


def _entries(fields: Mapping[str, Any], name: str) -> list[Any]:
    """The stored entries of a field, each an array of numbers or bytes; none where the file lacks it."""
    field = fields.get(name)
    return [] if field is None else [field.parts[at] for at in field.data]


def _single_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's fields that are no lists."""
    from gguf import GGUFValueType

    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name.startswith("tokenizer.") and field.types[0] != GGUFValueType.ARRAY:
            [part] = _entries(fields, name)
            is_text = field.types[0] == GGUFValueType.STRING
            values[name.removeprefix("tokenizer.")] = bytes(part).decode() if is_text else part[0].item()

    return values


def build(fields: Fields) -> Tokenizer | None:
    """The tokenizer that the fields describe; None for a kind that is left to transformers. Raises BadTokenizer."""
    if fields.kind == "gpt2":
        inner = byte_level(fields)
    elif fields.kind == "llama":
        inner = sentencepiece(fields)
    else:
        return None

    inner.post_processor = _frame(fields)
    _add_special_tokens(inner, fields)

    return inner


def byte_level(fields: Fields) -> Tokenizer:
    """Byte-level BPE, without its special tokens."""
    cut = str(fields.values.get("ggml.pre", "gpt-2"))
    if cut not in PATTERNS and cut not in LIKE_GPT_2:
        log.warning(
            "the GGUF file cuts texts in the way of %r, which is not known here, so they are cut as GPT-2 does: compare"
            " a few token ids with the model's own tokenizer, or take the folder that the file was made from",
            cut,
        )

    inner = Tokenizer(
        models.BPE(
            vocab={_in_alphabet(token): at for at, token in enumerate(fields.tokens)},
            merges=fields.merges,
            continuing_subword_prefix="",
            end_of_word_suffix="",
        )
    )
    inner.pre_tokenizer = _cutter(cut)
    inner.decoder = decoders.ByteLevel()

    return inner


def sentencepiece(fields: Fields) -> Tokenizer:
    """SentencePiece's BPE with bytes to fall back to, without its special tokens.

    Files without merges get those that their vocabulary implies. Raises BadTokenizer for one without scores too."""
    is_gemma = fields.architecture in GEMMA
    tokens = [_gemma_space(token) for token in fields.tokens] if is_gemma else fields.tokens
    ranks = [-float(at) for at in range(len(tokens))] if is_gemma else fields.scores
    if len(ranks) != len(tokens) and not fields.merges:
        raise BadTokenizer(f"its SentencePiece vocabulary has neither merges nor scores; {WAY_OUT}")

    inner = Tokenizer(
        models.BPE(
            vocab={token: at for at, token in enumerate(tokens)},
            merges=fields.merges or _implied_merges(tokens, ranks),
            unk_token=fields.token("unknown") if is_gemma else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    decoder = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    begins = not is_gemma and bool(fields.values.get("ggml.add_space_prefix", True))
    inner.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", 1, 0)] if begins else decoder)

    if is_gemma:
        inner.normalizer = normalizers.Replace(" ", SPACE)
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif fields.architecture == "phi3" and begins:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        scheme: Literal["first", "never"] = "first" if begins else "never"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)

    return inner


def _gemma_space(token: str) -> str:
    """A token of several spaces, which Gemma's files store as they are, with SentencePiece's sign for each."""
    return SPACE * len(token) if " " in token and not token.strip() else token


def _implied_merges(tokens: list[str], ranks: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the highest rank first."""
    at = {token: index for index, token in enumerate(tokens)}
    pairs: list[tuple[float, int, str, str]] = []

    for token, rank in zip(tokens, ranks, strict=True):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in halves if left in at and right in at]
        pairs += [(rank, len(left), left, right) for left, right in sorted(known, key=lambda pair: at[pair[0]])]

    # As SentencePiece, the longer left half first where two pairs make one token.
    pairs.sort(key=lambda pair: pair[:2], reverse=True)

    return [(left, right) for _, _, left, right in pairs]


def _cutter(kind: str) -> Any:
    """What cuts a text into the parts inside which tokens are merged."""
    if kind not in PATTERNS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[kind]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _frame(fields: Fields) -> Any:
    """Puts around each text the tokens that the file asks for."""
    first, last = (_framing(fields, name) for name in ("bos", "eos"))
    special = {token: fields.tokens.index(token) for token in (first, last) if token is not None}

    def around(part: str, kind: int) -> list[str]:
        return [f"{token}:{kind}" for token in (first, part, last) if token is not None]

    return processors.TemplateProcessing(
        single=around("$A", 0), pair=around("$A", 0) + around("$B", 1), special_tokens=list(special.items())
    )


def _framing(fields: Fields, name: str) -> str | None:
    """The token that stands at every text's beginning ("bos") or end ("eos"), or None.

    A SentencePiece vocabulary begins texts with one unless its file says otherwise: older files have no flag."""
    usual = fields.kind == "llama" and name == "bos"
    return fields.token(name) if fields.values.get(f"ggml.add_{name}_token", usual) else None


def _add_special_tokens(inner: Tokenizer, fields: Fields) -> None:
    """Keep control tokens, and those that the file's maker defined, in one piece.

    A token that is not in the vocabulary as it is written is mislabelled text, and would be added a second time."""
    vocabulary = inner.get_vocab()
    typed = [pair for pair in zip(fields.tokens, fields.types, strict=False) if pair[0] in vocabulary]

    inner.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, kind in typed if kind == CONTROL])
    inner.add_tokens([AddedToken(t, normalized=False, special=False) for t, kind in typed if kind == USER_DEFINED])


def _in_alphabet(token: str) -> str:
    """A token in byte-level BPE's alphabet of printable characters; one that is written as plain text is respelled."""
    if set(token) <= set(pre_tokenizers.ByteLevel.alphabet()):
        return token

    [(spelled, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(token)

    return spelled


def check(tokenizer: Any, fields: Fields) -> None:
    """Compare a tokenizer with the file it was made from.

    Raises BadTokenizer if it has fewer tokens than the file, if it puts a beginning-of-text token before a text of
    which the file says that it has none, or if a text does not come back from its token ids."""
    if len(tokenizer) < len(fields.tokens):
        raise BadTokenizer(
            f"its tokenizer was read with {len(tokenizer)} tokens, the file has {len(fields.tokens)}; {WAY_OUT}"
        )

    for text in SAMPLES:
        ids = tokenizer(text)["input_ids"]
        if fields.values.get("ggml.add_bos_token") is False and ids[0] == fields.values.get("ggml.bos_token_id"):
            raise BadTokenizer(
                f"its tokenizer begins each text with {fields.token('bos')!r}, which the file forbids; {WAY_OUT}"
            )

        back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if back.lstrip(" ") != text:
            raise BadTokenizer(f"its tokenizer gives back {back!r} for the text {text!r}; {WAY_OUT}")


def special_tokens(fields: Fields) -> dict[str, str]:
    """The special tokens that the file names, under the names that transformers gives them."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named: Iterable[tuple[str, str | None]] = ((ours, fields.token(theirs)) for theirs, ours in names.items())

    return {name: token for name, token in named if token is not None}
