"""Networks of Hugging Face transformers, in small configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.registry import Inputs, network, pixels, text

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LABELS = {"num_labels": 5}
LANGUAGE = {**SMALL, "max_position_embeddings": 64, "use_cache": False, "pad_token_id": 0}
PIXELS = {key: value for key, value in SMALL.items() if key != "vocab_size"} | LABELS


def model(name: str, kind: str, inputs: Inputs, **config: Any) -> None:
    """Enter a model of transformers by the name of its class; the name of its configuration begins the same."""

    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, kind)
        made = cls.config_class(**config)
        made.use_cache = False
        return cls(made)

    network("transformers", name, inputs)(make)


# Encoders of text
model("CamemBERT, tokens", "CamembertForTokenClassification", text(), **LANGUAGE, **LABELS)
model("RoFormer (rotary)", "RoFormerForSequenceClassification", text(), embedding_size=32, **LANGUAGE, **LABELS)
model("FNet", "FNetForSequenceClassification", lambda n: ((torch.randint(5, 99, (n, 16)),), {}), **LANGUAGE, **LABELS)
model("Nystromformer", "NystromformerForSequenceClassification", text(), num_landmarks=4, segment_means_seq_len=16,
      **LANGUAGE, **LABELS)  # fmt: skip
model("MobileBERT", "MobileBertForSequenceClassification", text(), embedding_size=16, intra_bottleneck_size=16,
      **LANGUAGE, **LABELS)  # fmt: skip
model("SqueezeBERT", "SqueezeBertForSequenceClassification", text(), embedding_size=32, **LANGUAGE, **LABELS)
model("MegatronBERT", "MegatronBertForSequenceClassification", text(), **LANGUAGE, **LABELS)
model("ConvBERT", "ConvBertForSequenceClassification", text(), embedding_size=32, head_ratio=2, **LANGUAGE, **LABELS)
model("I-BERT", "IBertForSequenceClassification", text(), **LANGUAGE, **LABELS)
model("ERNIE", "ErnieForQuestionAnswering", text(), **LANGUAGE)
model("LayoutLM", "LayoutLMForSequenceClassification", text(bbox=lambda n: torch.arange(4).expand(n, 16, 4)),
      max_2d_position_embeddings=128, **LANGUAGE, **LABELS)  # fmt: skip

# Language models
model("Mistral", "MistralForCausalLM", text(), num_key_value_heads=2, **LANGUAGE)
model("Gemma", "GemmaForCausalLM", text(), num_key_value_heads=1, head_dim=8, **LANGUAGE)
model("Phi", "PhiForCausalLM", text(), **LANGUAGE)
model("GPT-NeoX", "GPTNeoXForCausalLM", text(), **LANGUAGE)
model("StableLM", "StableLmForSequenceClassification", text(), num_key_value_heads=2, **LANGUAGE, **LABELS)
model("BLOOM (ALiBi)", "BloomForCausalLM", text(), vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
model("GPT-J", "GPTJForCausalLM", text(), vocab_size=99, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
model("Mamba", "MambaForCausalLM", lambda n: ((torch.randint(5, 99, (n, 12)),), {}), vocab_size=99, hidden_size=32,
      num_hidden_layers=2, state_size=4)  # fmt: skip

# Encoder and decoder
model("BART", "BartForSequenceClassification", lambda n: ((), {"input_ids": torch.cat(
      [torch.randint(5, 99, (n, 15)), torch.full((n, 1), 2)], 1)}), vocab_size=99, d_model=32, encoder_layers=2,
      decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
      max_position_embeddings=64, **LABELS)  # fmt: skip
model("T5", "T5ForConditionalGeneration", text(decoder_input_ids=lambda n: torch.randint(5, 99, (n, 8))), vocab_size=99,
      d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)  # fmt: skip

# Images
model("DINOv2 with registers", "Dinov2WithRegistersForImageClassification", pixels(), image_size=32, patch_size=8,
      mlp_ratio=2, **{k: v for k, v in PIXELS.items() if k != "intermediate_size"})  # fmt: skip
model("SigLIP", "SiglipVisionModel", pixels(), image_size=32, patch_size=8,
      **{k: v for k, v in PIXELS.items() if k != "num_labels"})  # fmt: skip
model("DPT", "DPTForDepthEstimation", pixels(), image_size=32, patch_size=8, neck_hidden_sizes=[8, 16, 16, 16],
      fusion_hidden_size=16, backbone_out_indices=[0, 1, 2, 3], **(PIXELS | {"num_hidden_layers": 4}))  # fmt: skip
model("PVT", "PvtForImageClassification", pixels(64), image_size=64, hidden_sizes=[16, 32, 40, 48], depths=[1, 1, 1, 1],
      num_attention_heads=[1, 2, 4, 4], **LABELS)  # fmt: skip
model("CvT", "CvtForImageClassification", pixels(64), embed_dim=[16, 32, 48], depth=[1, 1, 2], num_heads=[1, 2, 3],
      **LABELS)  # fmt: skip
model("LeViT", "LevitForImageClassification", pixels(64), image_size=64, hidden_sizes=[32, 48, 64], depths=[1, 1, 1],
      num_attention_heads=[2, 3, 4], key_dim=[8, 8, 8], **LABELS)  # fmt: skip
model("PoolFormer", "PoolFormerForImageClassification", pixels(64), hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
      **LABELS)  # fmt: skip
model("ConvNeXtV2", "ConvNextV2ForImageClassification", pixels(64), hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
      **LABELS)  # fmt: skip
model("BiT", "BitForImageClassification", pixels(64), embedding_size=64, hidden_sizes=[128, 256, 256, 256],
      num_groups=8,
      depths=[1, 1, 1, 1], **LABELS)  # fmt: skip
model("FocalNet", "FocalNetForImageClassification", pixels(64), image_size=64, embed_dim=16, depths=[1, 1, 1, 1],
      hidden_sizes=[16, 32, 64, 128], **LABELS)  # fmt: skip
model("CLIP", "CLIPVisionModelWithProjection", pixels(), image_size=32, patch_size=8, projection_dim=16,
      **{k: v for k, v in PIXELS.items() if k != "num_labels"})  # fmt: skip

# Sound and series
model("wav2vec 2.0", "Wav2Vec2ForSequenceClassification", lambda n: ((), {"input_values": torch.randn(n, 1600)}),
      conv_dim=[16, 16], conv_kernel=[10, 4], conv_stride=[5, 4], num_feat_extract_layers=2, classifier_proj_size=16,
      num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **(SMALL | LABELS | {"vocab_size": 32}))  # fmt: skip
model("HuBERT", "HubertForCTC", lambda n: ((), {"input_values": torch.randn(n, 1600)}), conv_dim=[16, 16],
      conv_kernel=[10, 4], conv_stride=[5, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=16,
      num_conv_pos_embedding_groups=4, **(SMALL | {"vocab_size": 32}))  # fmt: skip
model("AST", "ASTForAudioClassification", lambda n: ((), {"input_values": torch.randn(n, 64, 32)}), max_length=64,
      num_mel_bins=32, **PIXELS)  # fmt: skip
model("PatchTST", "PatchTSTForPrediction", lambda n: ((), {"past_values": torch.randn(n, 64, 3)}), num_input_channels=3,
      context_length=64, patch_length=8, patch_stride=8, d_model=32, num_hidden_layers=2, num_attention_heads=4,
      ffn_dim=64, prediction_length=8)  # fmt: skip
