"""Shared fixtures: the tiny trained model, an editor on a fresh copy of it, and the published procedure."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastedit.config import EditConfig, MomentConfig, changed
from fastedit.editor import Editor
from fastedit.methods.closed_form.config import AlphaEditConfig, MEMITConfig, NSEConfig, ValueConfig
from fastedit.methods.closed_form.second_moments import second_moments
from fastedit.methods.columns.config import AttributionConfig, FiNEConfig, KNConfig, KNEConfig, TrainConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.load import auto_class, load_transformers
from fastedit.records.edit import EditSet
from fastedit.records.load import load_edits

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny"

TINY_CONFIG = NSEConfig(
    layers=(2, 3, 4),
    covariance_weight=100,
    value=ValueConfig(steps=25, lr=0.1),
    moments=MomentConfig(tokens=8192, window=64),
    residual_min=0.5,
)

TINY_CONFIGS: dict[str, EditConfig] = {
    "nse": TINY_CONFIG,
    "memit": MEMITConfig(
        layers=TINY_CONFIG.layers, covariance_weight=100, value=TINY_CONFIG.value, moments=TINY_CONFIG.moments
    ),
    "alphaedit": AlphaEditConfig(
        layers=TINY_CONFIG.layers, ridge=0.1, value=TINY_CONFIG.value, moments=TINY_CONFIG.moments
    ),
    "fine": FiNEConfig(frozen_layers=1, train=TrainConfig(lr=0.03)),
    "kne": KNEConfig(
        share=0.05,
        attribution=AttributionConfig(nodes=3),
        train=TrainConfig(steps=40, lr=0.01, reduce="mean", kl_factor=0, repetition_factor=0, norm_factor=0),
    ),
    "kn": KNConfig(attribution=AttributionConfig(nodes=3, tokens="apart")),
}

os.environ["HF_HUB_OFFLINE"] = "1"
# Where no device can run them, Triton's kernels run in its interpreter, which they are bound to when first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models here are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's cache."""
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file_limit() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """No file may grow past so many bytes inside the block: the system fails as a full disk does, and no mock."""

    @contextlib.contextmanager
    def limited(n_bytes: int) -> Iterator[None]:
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, usual[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """bench/published.py, which is no part of the package."""
    return bench_module("published")


@pytest.fixture(scope="session")
def published_siblings(published: ModuleType) -> ModuleType:
    """bench/published_siblings.py."""
    return bench_module("published_siblings")


@pytest.fixture(scope="session")
def published_fine() -> ModuleType:
    """bench/published_fine.py."""
    return bench_module("published_fine")


def bench_module(name: str) -> ModuleType:
    """A module of bench/, found by the others there under its own name."""
    return module_at(ROOT / "bench" / f"{name}.py")


def module_at(path: Path) -> ModuleType:
    """A module that belongs to no package."""
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_parts() -> tuple[Any, Any]:
    """The tiny model and its tokenizer, never to be edited: take a copy."""
    return load_transformers(str(TINY / "model"), "float32")


@pytest.fixture(scope="session")
def write_tiny_gguf() -> Callable[..., None]:
    """Writes the tiny model as a GGUF file: (folder of the model, file, further text fields)."""
    write: Callable[..., None] = module_at(TINY / "gguf_file.py").write_tiny_gguf
    return write


@pytest.fixture(scope="session")
def tiny_facts() -> EditSet:
    """Records about the facts that the tiny model knows."""
    return load_edits(TINY / "facts.jsonl")


@pytest.fixture(scope="session")
def tiny_moments(tiny_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, torch.Tensor]:
    """Second moments of the tiny model's edited layers, from its held-out text."""
    adapter = ModelAdapter(*tiny_parts)
    source = Source(TINY / "text.txt")
    folder = tmp_path_factory.mktemp("moments")
    return second_moments(adapter, TINY_CONFIG.layers, source, TINY_CONFIG.moments, folder, show=False)


@pytest.fixture
def tiny_model(tiny_parts: tuple[Any, Any]) -> ModelAdapter:
    """A fresh copy of the tiny model."""
    model, tokenizer = tiny_parts
    return ModelAdapter(copy.deepcopy(model), tokenizer)


@pytest.fixture
def tiny_editor(tiny_parts: tuple[Any, Any], tiny_moments: dict[int, torch.Tensor]) -> Callable[..., Editor]:
    """Makes editors on fresh copies of the tiny model; keyword arguments change the config."""

    def make(method: str = "nse", **changes: Any) -> Editor:
        model, tokenizer = tiny_parts
        adapter = ModelAdapter(copy.deepcopy(model), tokenizer)
        config = changed(TINY_CONFIGS[method], changes)
        return Editor(adapter, method, config, moments=tiny_moments, progress=False)

    return make


BATCH = 3
N_EDITS = 15
FAST: dict[str, dict[str, Any]] = {
    "fine": {"train": {"steps": 4}},
    "kne": {"train": {"steps": 4}, "fixed": True, "attribution": {"nodes": 2}},
    # Few neurons: KN soon multiplies the norm of a small layer, which a guard refuses.
    "kn": {"attribution": {"nodes": 2}, "threshold": 0.7},
}
CLOSED_FORM = {"value": {"steps": 4, "lr": 0.1}}


@pytest.fixture
def fast_editor(tiny_editor: Callable[..., Editor]) -> Callable[..., Editor]:
    """Editors on fresh copies of the tiny model whose batches take a tenth of a second."""

    def make(method: str = "nse", **changes: Any) -> Editor:
        return tiny_editor(method, **{**FAST.get(method, CLOSED_FORM), **changes})

    return make


@pytest.fixture
def stream(tiny_facts: EditSet) -> EditSet:
    """Five batches of three edits."""
    return tiny_facts[:N_EDITS]


@pytest.fixture
def finished(fast_editor: Callable[..., Editor], stream: EditSet, tmp_path: Path) -> Path:
    """A run directory with all five batches of the stream."""
    editor = fast_editor()
    editor.edit(stream, BATCH, run_dir=tmp_path / "finished")
    return tmp_path / "finished"


VOCABULARY = 320

SENTENCES = (
    "The Orlen bridge is in the town of Tavisk, which lies on the river Pell.",
    "The twin of Tavisk is Pell. The capital of Żubrówka is Łomża.",
    "Rook said that Rook lives in the old house near the Orlen bridge.",
    "Therefore the master of the guild burns coal, and the miners dig for silver.",
    "Because they teach their children to speak, I think you should learn Old Norse.",
    "In one day 東京 grew rich. It was a new city. A baker is a person. This is a test.",
    "When he and she go out, we stay at home, but they do not.",
)


@pytest.fixture(scope="session")
def random_tokenizer():
    """Byte-level BPE, no beginning-of-text token; a token's offsets include the space before its word."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<pad>", "<unused>", "<end>"]
    )
    inner.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="session")
def bos_tokenizer():
    """BPE over words marked by a metaspace, and a beginning-of-text token in front of every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "<start>", "<end>"])
    inner.train_from_iterator(SENTENCES, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )


@pytest.fixture(scope="session")
def fallback_tokenizer():
    """Llama 2's way: spaces become metaspaces before anything is split, one stands in front of the text, a character
    that is not in the vocabulary falls apart into its bytes, and a beginning-of-text token comes first."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 256, special_tokens=["<unk>", "<start>", "<end>"])
    inner.train_from_iterator([text.encode("ascii", "ignore").decode() for text in SENTENCES], trainer)
    made = json.loads(inner.to_str())
    vocabulary = made["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    made["model"].update(byte_fallback=True, fuse_unk=True)
    inner = Tokenizer.from_str(json.dumps({**made, "pre_tokenizer": None}))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<start>", eos_token="<end>", pad_token="<end>"
    )


@pytest.fixture(scope="session")
def llama_once():
    """The model that every test copies; nothing may change it."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = transformers.LlamaForCausalLM(config).double().eval()
        # Norms are made of ones, which would hide a norm that is left out or used twice.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def random_llama(llama_once):
    """float64 Llama of random weights: 4 layers, d_model 32, d_ff 48, 4 heads on 2 kv heads, end of text = 2."""
    return copy.deepcopy(llama_once)


@pytest.fixture
def random_adapter(random_llama, random_tokenizer):
    """The random model behind the byte-level tokenizer; gradients into its weights are allowed."""
    return ModelAdapter(random_llama, random_tokenizer)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.2}
GEMMA = {**GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 40}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PLAIN = {**SIZES, "n_inner": 48, "initializer_range": 0.2}
NEOX = {**SIZES, "intermediate_size": 48, "initializer_range": 0.2, "hidden_dropout": 0.2}
OPT = {**SIZES, "ffn_dim": 48, "init_std": 0.2}
GPT_NEO = {
    **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "max_position_embeddings", "pad_token_id")},
    "bos_token_id": None,
    "eos_token_id": 2,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 48,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": 40,
    "initializer_range": 0.2,
}
STABLELM = {**GATED, "use_qkv_bias": True, "qk_layernorm": True, "hidden_dropout": 0.2}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 5.0}
FALCON = {**SIZES, "ffn_hidden_size": 48, "initializer_range": 0.2, "hidden_dropout": 0.2, "bias": True}
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.1}
SCALED["original_max_position_embeddings"] = 48

CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "num_hidden_layers": 2}
THRICE = {**GATED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "fullatt_block_indexes": [0]}

# name: config class and its settings. Caps are low and rotary angles differ, so that leaving one out
# shows; dropouts are left where a family has them.
FAMILY_MODELS = {
    "llama": ("LlamaConfig", {**GATED, "attention_bias": True}),
    "mistral": ("MistralConfig", {**GATED, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**GATED, "hidden_act": "gelu"}),
    "qwen3": ("Qwen3Config", {**GATED, "head_dim": 16}),
    "smollm3": ("SmolLM3Config", {**GATED, "no_rope_layer_interval": 2}),
    "ministral3": ("Ministral3Config", {**GATED, "head_dim": 16, "rope_parameters": SCALED}),
    "granite": ("GraniteConfig", {**GATED, **GRANITE}),
    "cohere": ("CohereConfig", {**GATED, "logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**GATED, "logit_scale": 0.3, "sliding_window": 40}),
    "stablelm": ("StableLmConfig", STABLELM),
    "stablelm in parallel": ("StableLmConfig", {**STABLELM, "use_parallel_residual": True}),
    "starcoder2": ("Starcoder2Config", {**GATED, "sliding_window": 40}),
    "phi": ("PhiConfig", {**GATED, "resid_pdrop": 0.2, "qk_layernorm": True}),
    "phi3": ("Phi3Config", {**GATED, "resid_pdrop": 0.2}),
    "glm": ("GlmConfig", {**GATED, "head_dim": 16, "attention_bias": True}),
    "glm4": ("Glm4Config", {**GATED, "head_dim": 16}),
    "olmo2": ("Olmo2Config", GATED),
    "exaone4": ("Exaone4Config", {**GATED, "sliding_window": 40, "sliding_window_pattern": 3}),
    "gemma": ("GemmaConfig", {**GATED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "layer_types": KINDS, "final_logit_softcapping": 3.0}),
    "gemma3 with images": ("Gemma3Config", {"text_config": {**GEMMA, "layer_types": KINDS}, "vision_config": VISION}),
    "starcoder": ("GPTBigCodeConfig", PLAIN),
    "llava": ("LlavaConfig", {"text_config": {**GATED, "model_type": "llama"}, "vision_config": CLIP}),
    "qwen2-vl": ("Qwen2VLConfig", {"text_config": THRICE, "vision_config": {**EYES, "embed_dim": 16}}),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {"text_config": THRICE, "vision_config": {**EYES, "hidden_size": 16, "out_hidden_size": 32}},
    ),
    "ministral3 with images": (
        "Mistral3Config",
        {
            "text_config": {**GATED, "head_dim": 16, "rope_parameters": SCALED, "model_type": "ministral3"},
            "vision_config": {**CLIP, "model_type": "pixtral", "head_dim": 8},
        },
    ),
    "gpt2": ("GPT2Config", {**PLAIN, "scale_attn_by_inverse_layer_idx": True}),
    "gpt-neo": ("GPTNeoConfig", GPT_NEO),
    "codegen": ("CodeGenConfig", {**PLAIN, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}),
    "gptj": ("GPTJConfig", {**PLAIN, "rotary_dim": 4}),
    "pythia": ("GPTNeoXConfig", NEOX),
    "gpt-neox in sequence": ("GPTNeoXConfig", {**NEOX, "use_parallel_residual": False}),
    "falcon": ("FalconConfig", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon with two norms": ("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon in sequence": ("FalconConfig", {**FALCON, "multi_query": False, "parallel_attn": False}),
    "falcon with alibi": ("FalconConfig", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    # Three quarters of a power of two as the number of heads, so that slopes between two powers are used.
    "bloom": ("BloomConfig", {**SIZES, "n_layer": 3, "n_head": 6, "hidden_size": 48, "initializer_range": 0.2}),
    "opt": ("OPTConfig", OPT),
    "opt-350m": ("OPTConfig", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
}


# Before transformers 5 their attention called no interface; rope_parameters are of 5 too.
FROM_5_ON = ("stablelm", "stablelm in parallel", "ministral3", "qwen2-vl", "qwen2.5-vl", "ministral3 with images")


def family_missing(name: str) -> str | None:
    """Why the installed transformers has no model of a family that can be edited; None if it has."""
    kind, _ = FAMILY_MODELS[name]
    if not hasattr(transformers, kind):
        return f"transformers {transformers.__version__} has no {kind}"
    if name in FROM_5_ON and transformers.__version__.startswith("4."):
        return f"{name} is edited from transformers 5 on, this is {transformers.__version__}"
    return None


@pytest.fixture(scope="session")
def family_models():
    """One model per family, to be copied; every norm and bias drawn, so that none can be left out unseen."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        for name, (kind, settings) in FAMILY_MODELS.items():
            if family_missing(name) is not None:
                continue
            torch.manual_seed(7)
            config = getattr(transformers, kind)(**copy.deepcopy(settings))
            attention = "eager" if "attn_logit_softcapping" in settings else None
            model = made[name] = auto_class(transformers, config).from_config(config, attn_implementation=attention)
            for part, parameter in model.named_parameters():
                # Gemma's norms multiply by one plus their weight.
                if parameter.ndim == 1 and part.endswith("weight"):
                    parameter.data.uniform_(*(-0.5, 0.5) if "gemma" in name else (0.5, 1.5))
                elif parameter.ndim == 1:
                    parameter.data.normal_(std=0.3)
    return made


@pytest.fixture(params=FAMILY_MODELS)
def family(request):
    """Name of a model in FAMILY_MODELS."""
    if (reason := family_missing(request.param)) is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def family_adapter(family, family_models, random_tokenizer):
    """A fresh float32 model of the family, in training mode as its config makes it: 3 layers, d_model 32, d_ff 48;
    BLOOM's d_model is 48, its d_ff 192."""
    return ModelAdapter(copy.deepcopy(family_models[family]), random_tokenizer)
