"""The table of model sizes, one line each."""

from models.config import AttentionBias, LlamaConfig, NormPosition, QkNorm
from models.rope import RopeScaling


def _size(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    ffn_dim: int,
    vocab_size: int,
    max_seq_len: int,
    *,
    rope_theta: float = 10000.0,
    rope_scaling: RopeScaling | None = None,
    tie_embeddings: bool = False,
    norm_eps: float = 1e-5,
    head_dim: int | None = None,
    sliding_window: int | None = None,
    attention_bias: AttentionBias = "none",
    qk_norm: QkNorm = "none",
    norm_position: NormPosition = "pre",
) -> LlamaConfig:
    return LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        ffn_dim=ffn_dim,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=tie_embeddings,
        norm_eps=norm_eps,
        head_dim=head_dim,
        sliding_window=sliding_window,
        attention_bias=attention_bias,
        qk_norm=qk_norm,
        norm_position=norm_position,
    )


_LLAMA32 = RopeScaling(factor=32.0)

# name: dim, layers, heads, kv heads, ffn, vocabulary, context
SIZES: dict[str, LlamaConfig] = {
    "tiny": _size(32, 4, 4, 2, 64, 64, 64),
    "demo": _size(128, 8, 2, 1, 352, 2048, 256),
    "110m": _size(768, 12, 12, 12, 2048, 32000, 2048),
    "350m": _size(1024, 24, 16, 16, 2816, 32000, 2048),
    "layerskip_1.5b": _size(2048, 24, 16, 16, 5632, 32000, 4096),
    "llama1_7b": _size(4096, 32, 32, 32, 11008, 32000, 2048, norm_eps=1e-6),
    "llama2_7b": _size(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama2_13b": _size(5120, 40, 40, 40, 13824, 32000, 4096),
    "llama2_70b": _size(8192, 80, 64, 8, 28672, 32000, 4096),
    "llama3_8b": _size(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=5e5),
    "llama3.2_1b": _size(
        2048, 16, 32, 8, 8192, 128256, 8192,
        rope_theta=5e5, rope_scaling=_LLAMA32, tie_embeddings=True,
    ),
    "mistral_7b": _size(4096, 32, 32, 8, 14336, 32000, 8192, sliding_window=4096),
    "qwen2.5_1.5b": _size(
        1536, 28, 12, 2, 8960, 151936, 8192,
        rope_theta=1e6, tie_embeddings=True, norm_eps=1e-6, attention_bias="qkv",
    ),
    "qwen3_0.6b": _size(
        1024, 28, 16, 8, 3072, 151936, 8192,
        rope_theta=1e6, tie_embeddings=True, norm_eps=1e-6, head_dim=128, qk_norm="head",
    ),
    "olmo2_1b": _size(
        2048, 16, 16, 16, 8192, 100352, 4096,
        rope_theta=5e5, norm_eps=1e-6, qk_norm="full", norm_position="post",
    ),
    "smollm2_1.7b": _size(
        2048, 24, 32, 32, 8192, 49152, 8192, rope_theta=1.3e5, tie_embeddings=True
    ),
}  # fmt: skip
