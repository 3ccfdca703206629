"""Architectures of transformers with random weights against a loop over single examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.architectures import (
    OWN_LOSS,
    TOKENS,
    images,
    large_images,
    masked_tokens,
    next_tokens,
    own_loss,
    spectra,
    spectrograms,
    texts,
    translations,
    waves,
    whole_texts,
)
from tests.oracle_nets import assert_exact, cross_entropy, randomise


class Text(NamedTuple):
    """One architecture with sequences of different lengths.

    Attributes:
        model_class: In transformers.
        settings: Of its configuration.
        task: What the examples and the loss are.
    """

    model_class: str
    settings: dict[str, Any]
    task: Callable[[int, int], tuple[dict[str, Tensor], Tensor]]

    @property
    def loss(self) -> Callable[[nn.Module, Any], Tensor]:
        return own_loss if self.task in OWN_LOSS else cross_entropy

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        kind = getattr(transformers, self.model_class)
        config = kind.config_class(**self.settings)
        config._experts_implementation = "eager"  # the others have no float64
        model: nn.Module = kind(config).double().eval()
        randomise(model, 0.05)
        return model

    def batch(self, count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        return self.task(count, seed)


_BERT = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 0,
}
_SMALL_EMBEDDING = {**_BERT, "embedding_size": 16}
_DECODER = {**_BERT, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {
    "vocab_size": TOKENS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "num_labels": 3,
    "pad_token_id": 0,
}
_T5 = {
    "vocab_size": TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
    "num_labels": 3,
}
_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_IMAGE = {**_VIT, "num_labels": 3}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 3,
}
_STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "num_labels": 3}
_PYRAMID = {
    "image_size": 32,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "num_labels": 3,
}
_SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 16],
    "conv_stride": [4, 2, 2],
    "conv_kernel": [6, 3, 3],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "num_labels": 3,
}

FAST = {
    "bert": Text("BertForSequenceClassification", _BERT, texts),
    "bert, masked tokens": Text("BertForMaskedLM", _BERT, masked_tokens),
    "distilbert": Text(
        "DistilBertForSequenceClassification",
        {"vocab_size": TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        | {"max_position_embeddings": 40, "num_labels": 3},
        texts,
    ),
    "roberta": Text("RobertaForSequenceClassification", _BERT, texts),
    "albert": Text("AlbertForSequenceClassification", _SMALL_EMBEDDING, texts),
    "deberta-v2": Text(
        "DebertaV2ForSequenceClassification",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
        | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
        texts,
    ),
    "mpnet": Text("MPNetForSequenceClassification", _BERT, texts),
    "modernbert": Text(
        "ModernBertForSequenceClassification",
        {**_BERT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
        | {"local_attention": 4},
        texts,
    ),
    "gpt2": Text("GPT2LMHeadModel", _GPT, next_tokens),
    "llama": Text("LlamaForCausalLM", _DECODER, next_tokens),
    "qwen3": Text("Qwen3ForCausalLM", _DECODER, next_tokens),
    "gemma": Text("GemmaForCausalLM", _DECODER, next_tokens),
    "t5": Text("T5ForConditionalGeneration", _T5, translations),
    "bart": Text("BartForConditionalGeneration", _BART, translations),
    "vit": Text("ViTForImageClassification", _IMAGE, images),
    "wav2vec2": Text("Wav2Vec2ForSequenceClassification", _SPEECH, waves),
}

_TEXT = {
    name: Text(f"{family}ForSequenceClassification", settings, texts)
    for name, family, settings in (
        ("xlm-roberta", "XLMRoberta", _BERT),
        ("camembert", "Camembert", _BERT),
        ("ernie", "Ernie", _BERT),
        ("electra", "Electra", _SMALL_EMBEDDING),
        ("roformer", "RoFormer", _SMALL_EMBEDDING),
        ("convbert", "ConvBert", _SMALL_EMBEDDING),
        ("rembert", "RemBert", {**_BERT, "input_embedding_size": 16}),
        ("layoutlm", "LayoutLM", _BERT),
        ("big_bird", "BigBird", {**_BERT, "attention_type": "original_full"}),
        ("megatron-bert", "MegatronBert", _BERT),
        ("data2vec text", "Data2VecText", _BERT),
        ("esm", "Esm", {**_BERT, "position_embedding_type": "rotary", "mask_token_id": 3}),
        ("ibert", "IBert", _BERT),
        ("squeezebert", "SqueezeBert", {**_BERT, "embedding_size": 32}),
        (
            "mobilebert",
            "MobileBert",
            {**_SMALL_EMBEDDING, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        ),
        (
            "nystromformer",
            "Nystromformer",
            {**_BERT, "segment_means_seq_len": 40, "num_landmarks": 40},
        ),
        ("longformer", "Longformer", {**_BERT, "attention_window": [4, 4]}),
        ("deberta", "Deberta", {**_BERT, "relative_attention": True, "pos_att_type": ["c2p"]}),
        ("xlnet", "XLNet", {**_T5, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 3}),
        (
            "funnel",
            "Funnel",
            {"vocab_size": TOKENS, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8}
            | {"d_inner": 48, "num_labels": 3},
        ),
        ("gpt2, classes", "GPT2", _GPT),
        ("llama, classes", "Llama", _DECODER),
    )
}
_CAUSAL = {
    name: Text(f"{family}ForCausalLM", settings, next_tokens)
    for name, family, settings in (
        ("gpt-neox", "GPTNeoX", _BERT),
        ("gptj", "GPTJ", {**_GPT, "rotary_dim": 4}),
        ("codegen", "CodeGen", {**_GPT, "rotary_dim": 4}),
        (
            "gpt-neo",
            "GPTNeo",
            {**_BERT, "num_layers": 2, "num_heads": 4, "window_size": 4}
            | {"attention_types": [[["global", "local"], 1]]},
        ),
        ("opt", "OPT", {**_BERT, "ffn_dim": 48, "word_embed_proj_dim": 16}),
        ("bloom", "Bloom", {"vocab_size": TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("mistral", "Mistral", _DECODER),
        ("mixtral", "Mixtral", {**_DECODER, "num_local_experts": 3}),
        ("qwen2", "Qwen2", _DECODER),
        ("qwen2-moe", "Qwen2Moe", {**_DECODER, "moe_intermediate_size": 16, "num_experts": 4}),
        ("gemma2", "Gemma2", _DECODER),
        ("phi", "Phi", _BERT),
        ("phi3", "Phi3", _DECODER),
        ("falcon", "Falcon", _BERT),
        ("stablelm", "StableLm", _DECODER),
        ("olmo2", "Olmo2", _DECODER),
        ("cohere", "Cohere", _DECODER),
        ("granite", "Granite", _DECODER),
        ("starcoder2", "Starcoder2", _DECODER),
        ("persimmon", "Persimmon", _BERT),
        ("glm", "Glm", _DECODER),
        ("mpt", "Mpt", {**_T5, "n_layers": 2, "n_heads": 4, "max_seq_len": 40}),
        ("biogpt", "BioGpt", _BERT),
        ("mamba", "Mamba", {**_BERT, "state_size": 4, "conv_kernel": 3, "time_step_rank": 4}),
        (
            "mamba2",
            "Mamba2",
            {**_BERT, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2},
        ),
        ("rwkv", "Rwkv", {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2}),
    )
}
_SEQUENCES = {
    name: Text(f"{family}ForConditionalGeneration", settings, translations)
    for name, family, settings in (
        (
            "t5 gated",
            "T5",
            {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ),
        ("mt5", "MT5", _T5),
        ("umt5", "UMT5", _T5),
        ("longt5", "LongT5", {**_T5, "local_radius": 3}),
        ("mbart", "MBart", _BART),
        ("pegasus", "Pegasus", _BART),
        ("blenderbot", "Blenderbot", _BART),
        ("m2m100", "M2M100", _BART),
    )
}
_IMAGES = {
    name: Text(f"{family}ForImageClassification", settings, images)
    for name, family, settings in (
        ("deit", "DeiT", _IMAGE),
        ("vit_msn", "ViTMSN", _IMAGE),
        ("beit", "Beit", {**_IMAGE, "use_relative_position_bias": True}),
        (
            "data2vec vision",
            "Data2VecVision",
            {**_IMAGE, "use_shared_relative_position_bias": True},
        ),
        ("dinov2", "Dinov2", _IMAGE),
        ("dinov2 registers", "Dinov2WithRegisters", _IMAGE),
        ("clip", "CLIP", {"vision_config": _VIT, "num_labels": 3}),
        ("siglip", "Siglip", {"vision_config": _VIT, "num_labels": 3}),
        ("swin", "Swin", _SWIN),
        ("swinv2", "Swinv2", _SWIN),
        ("convnext", "ConvNext", _STAGES),
        ("convnextv2", "ConvNextV2", _STAGES),
        ("pvt", "Pvt", _PYRAMID),
        ("pvt_v2", "PvtV2", _PYRAMID),
        ("poolformer", "PoolFormer", _STAGES),
        ("resnet", "ResNet", {**_STAGES, "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32]}),
        (
            "focalnet",
            "FocalNet",
            {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_labels": 3},
        ),
        ("mobilenet_v2", "MobileNetV2", {"depth_multiplier": 0.25, "num_labels": 3}),
    )
}
SLOW = {
    **_TEXT,
    **_CAUSAL,
    **_SEQUENCES,
    **_IMAGES,
    "fnet": Text("FNetForSequenceClassification", _BERT, whole_texts),
    "openai-gpt": Text("OpenAIGPTLMHeadModel", _GPT, next_tokens),
    "ctrl": Text("CTRLLMHeadModel", {**_GPT, "dff": 48}, next_tokens),
    "marian": Text("MarianMTModel", _BART, translations),
    "segformer": Text(
        "SegformerForImageClassification",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
        | {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2]}
        | {"mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 3},
        images,
    ),
    "hubert": Text("HubertForSequenceClassification", _SPEECH, waves),
    "wavlm": Text("WavLMForSequenceClassification", {**_SPEECH, "num_buckets": 8}, waves),
    "whisper": Text(
        "WhisperForAudioClassification",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 12, "classifier_proj_size": 16},
        spectra,
    ),
    "ast": Text(
        "ASTForAudioClassification",
        {**_VIT, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16}
        | {"num_mel_bins": 8, "num_labels": 3},
        spectrograms,
    ),
    "levit": Text(
        "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 2, 2]}
        | {"depths": [1, 1, 1], "key_dim": [8, 8, 8], "num_labels": 3},
        large_images,
    ),
}

ONE_BY_ONE = {
    "longformer.*.self.*": ("longformer",),
    "*": ("xlnet",),
    "*Experts.*_proj": ("mixtral", "qwen2-moe"),
}
"""Patterns of the parameters that may be computed one example at a time, and in which models."""


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_architecture_equals_the_loop(name: str) -> None:
    case = (FAST | SLOW)[name]
    slow = [pattern for pattern, names in ONE_BY_ONE.items() if name in names]
    batches = [case.batch(3, 0), case.batch(2, 1)]
    # the norms of many models compute in float32, whatever they get
    assert_exact(case.model(), batches, case.loss, one_by_one=slow, rtol=1e-5)
