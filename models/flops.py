"""Parameters and floating-point operations of a Llama, with and without exits."""

from models.config import LlamaConfig


def block_params(config: LlamaConfig) -> int:
    """Return the number of parameters in one transformer block."""
    return attention_params(config) + feed_forward_params(config)


def step_params(config: LlamaConfig, layers: int) -> int:
    """Return the number of parameters that a step of so many layers and the head reads."""
    return layers * block_params(config) + config.vocab_size * config.dim


def attention_params(config: LlamaConfig) -> int:
    """Return the number of parameters in the attention of one block, its norms included."""
    width, kv_width = (n * config.head_width for n in (config.n_heads, config.n_kv_heads))
    matrices = 2 * config.dim * (width + kv_width)
    biases = {"none": 0, "qkv": width + 2 * kv_width, "qkvo": width + 2 * kv_width + config.dim}
    norms = {"none": 0, "head": 2 * config.head_width, "full": width + kv_width}
    return matrices + config.dim + biases[config.attention_bias] + norms[config.qk_norm]


def feed_forward_params(config: LlamaConfig) -> int:
    """Return the number of parameters in one feed-forward layer and its norm."""
    biases = 2 * config.ffn_dim + config.dim if config.ffn_bias else 0
    return 3 * config.dim * config.ffn_dim + config.dim + biases


def total_params(config: LlamaConfig) -> int:
    """Return the number of parameters, a tied embedding counted once."""
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    layers = config.n_layers * (block_params(config) + router_params(config))
    return layers + config.dim + embeddings + own_exit_params(config)


def router_params(config: LlamaConfig) -> int:
    """Return the number of parameters in the router of one layer; 0 where there is none."""
    if config.router == "none":
        return 0
    width = config.router_width
    return config.dim * width + (width or config.dim) + 1


def own_exit_params(config: LlamaConfig) -> int:
    """Return the number of parameters of all exits' own parts."""
    feed_forward = feed_forward_params(config) if config.own_exit_mlp else 0
    return len(config.own_exits) * (config.dim + feed_forward)


def head_flops_per_token(config: LlamaConfig) -> float:
    """Return the FLOPs of one LM head, forward and backward, for one token: 6 dim vocab."""
    return 6.0 * config.dim * config.vocab_size


def layer_flops_per_token(config: LlamaConfig, seq_len: int, capacity: float = 1.0) -> float:
    """Return the FLOPs of one layer, forward and backward, for one token of a causal sequence.

    6 per weight, plus attention's 6 n_heads head_dim seq_len (PaLM, arXiv 2204.02311, appendix B,
    halved because a causal query attends to half the keys on average; fewer with a sliding window
    of w tokens: w - w^2 / (2 seq_len)). Where a layer runs the share
    `capacity` of the tokens, the others compute keys, values and the router alone.
    """
    of_all = 2 * config.dim * config.head_width * config.n_kv_heads + config.dim
    w = min(config.sliding_window or seq_len, seq_len)
    keys = w - w * w / (2 * seq_len)
    attention = 12.0 * config.n_heads * config.head_width * keys
    of_some = 6.0 * (block_params(config) - of_all) + attention
    return 6.0 * (of_all + router_params(config)) + capacity * of_some


def train_flops_per_token(
    config: LlamaConfig,
    seq_len: int,
    *,
    mean_layers: float,
    mean_exits: float,
    capacity: float = 1.0,
    mean_own_exits: float = 0.0,
    frozen: bool = False,
) -> float:
    """Return the FLOPs to train on one token.

    Args:
        config: The model.
        seq_len: Tokens per sequence.
        mean_layers: Layers run per token: n_layers less what layer dropout drops.
        mean_exits: LM heads evaluated per token, the last layer's included.
        capacity: Share of the tokens that each of these layers runs.
        mean_own_exits: Those of the heads that read through parts of an exit's own.
        frozen: Only these parts learn: layers have no backward, and the head's backward computes
            the gradient of its input alone.
    """
    layer = layer_flops_per_token(config, seq_len, capacity)
    layers = mean_layers * layer * (1 / 3 if frozen else 1)
    heads = mean_exits * head_flops_per_token(config) * (2 / 3 if frozen else 1)
    own = 6.0 * own_exit_params(config) / max(len(config.own_exits), 1)
    return layers + heads + mean_own_exits * own
