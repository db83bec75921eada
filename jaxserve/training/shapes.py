"""The architectures of the embedded models: Llama-like, grouped queries, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.config import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormSpec,
    RopeSpec,
    uniform_layers,
)
from jaxserve.training.tokenizer import MAX_TOKENS

VOCAB_SIZE = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one embedded model."""

    name: str
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int

    def config(self) -> ModelConfig:
        """Returns the architecture."""
        norm = NormSpec(NormKind.RMS, eps=1e-5)
        rope = RopeSpec(self.head_dim)
        layer = LayerSpec(
            AttentionSpec(self.num_heads, self.num_kv_heads, self.head_dim, rope=rope),
            MlpSpec(self.ffn_dim, Activation.SILU, gated=True),
            norm,
        )
        return ModelConfig(
            "llama",
            vocab_size=VOCAB_SIZE,
            embed_dim=self.embed_dim,
            layers=uniform_layers(layer, self.num_layers),
            final_norm=norm,
            max_context_tokens=MAX_TOKENS,
            tied=True,
        )


TINY = Shape("tiny", 256, 6, 8, 2, 32, 768)
"""5.0M parameters."""
TINY_DRAFT = Shape("tiny-draft", 128, 4, 4, 2, 32, 384)
"""1.0M parameters."""
