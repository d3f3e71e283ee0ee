"""The shape of a Llama model."""

from dataclasses import dataclass, replace
from typing import Literal

from data.foreign_json import build, shown
from models.rope import RopeScaling

AttentionBias = Literal["none", "qkv", "qkvo"]
QkNorm = Literal["none", "head", "full"]
NormPosition = Literal["pre", "post"]

# No real model is beyond these, and nothing is allocated for a shape that is.
_BOUNDS: dict[str, tuple[float, float]] = {
    "dim": (1, 2**17),
    "n_layers": (1, 1024),
    "n_heads": (1, 2**12),
    "n_kv_heads": (1, 2**12),
    "ffn_dim": (1, 2**20),
    "vocab_size": (1, 2**24),
    "max_seq_len": (2, 2**22),
    "norm_eps": (1e-30, 1),
    "rope_theta": (1, 1e15),
    "head_dim": (2, 2**12),
    "sliding_window": (1, 2**22),
}
_MOST_WIDTH = 2**17
"""Of all heads together, as of dim."""
_SMALL_TABLE_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama, or of a model that differs from one by the fields from head_dim on.

    Names as Meta writes them.
    """

    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Number of transformer blocks, L."""
    n_heads: int
    """Number of query heads."""
    n_kv_heads: int
    """Number of key and value heads; divides n_heads (equal: MHA, fewer: GQA)."""
    ffn_dim: int
    """Width of the SwiGLU feed-forward layer."""
    vocab_size: int
    """Number of token ids."""
    max_seq_len: int
    """Longest context in tokens; the rotary table has this many rows."""
    head_dim: int | None = None
    """Width of one attention head; None: dim / n_heads."""
    sliding_window: int | None = None
    """Tokens that a query attends to at most, itself the last of them; None: all before it."""
    attention_bias: AttentionBias = "none"
    """Attention's projections that add a bias: none, those of queries, keys and values, or these
    and the output's."""
    ffn_bias: bool = False
    """Let the feed-forward layer's three projections add a bias."""
    qk_norm: QkNorm = "none"
    """RMS-norm queries and keys before their rotation: each head by itself, or all as one vector
    (full)."""
    norm_position: NormPosition = "pre"
    """pre: x + f(norm(x)). post: x + norm(f(x)), as OLMo 2."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Llama 3 frequency scaling, or None."""
    tie_embeddings: bool = False
    """Use the token embedding as the LM head."""
    router: Literal["none", "linear", "mlp"] = "none"
    """A gate for each layer that decides token by token whether it runs: linear in the state, or an
    MLP a quarter as wide as dim. none: every token runs every layer."""
    own_exits: tuple[int, ...] = ()
    """E, the layers run, of the exits that read through a norm of their own; all others read
    through the final norm."""
    own_exit_mlp: bool = False
    """Give these exits a feed-forward layer of their own too, before that norm."""

    @property
    def head_width(self) -> int:
        """Width of one attention head, `head_dim` where it is given."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def router_width(self) -> int:
        """Width of the MLP in each router; 0 where there is none."""
        return max(1, self.dim // 4) if self.router == "mlp" else 0

    @property
    def num_block_parameters(self) -> int:
        """Number of weights in the matrices of all layers."""
        heads = 2 * self.n_heads + 2 * self.n_kv_heads
        return self.n_layers * self.dim * (heads * self.head_width + 3 * self.ffn_dim)

    def has_weights_of(self, other: "LlamaConfig") -> bool:
        """Whether the two have the same weights: they differ in the context at most.

        No weight depends on it, as the rotary table is computed.
        """
        shape = replace(other, max_seq_len=self.max_seq_len, head_dim=other.head_width)
        return replace(self, head_dim=self.head_width) == shape

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        values = {name: getattr(self, name) for name in _BOUNDS}
        found = [
            f"model.{name}: {values[name]}, must be {least} to {most}"
            for name, (least, most) in _BOUNDS.items()
            if values[name] is not None and not least <= values[name] <= most  # so is NaN
        ]
        if found:
            return found
        if self.head_dim is not None:
            if self.head_dim % 2 or self.n_heads * self.head_dim > _MOST_WIDTH:
                found.append(
                    f"model.head_dim: {self.head_dim}, must be even, and {self.n_heads} heads "
                    f"together at most {_MOST_WIDTH} wide"
                )
        elif self.dim % self.n_heads:
            found.append(
                f"model.n_heads: {self.n_heads} does not divide model.dim {self.dim}, "
                "choose a divisor"
            )
        elif self.head_width % 2:
            found.append(
                f"model.n_heads: {self.n_heads} gives an odd head width {self.head_width}, "
                "rotary embeddings need an even one"
            )
        if self.n_heads % self.n_kv_heads:
            found.append(
                f"model.n_kv_heads: {self.n_kv_heads} does not divide model.n_heads "
                f"{self.n_heads}, choose a divisor"
            )
        if self.rope_scaling is not None:
            found += self.rope_scaling.problems()
        table = 2 * 4 * self.head_width * self.max_seq_len
        if table > max(_SMALL_TABLE_BYTES, 4 * self.num_block_parameters):
            found.append(
                f"model.max_seq_len: {self.max_seq_len}, its rotary table has {table / 2**30:.1f} "
                "GiB, more than the weights, choose less"
            )
        ascending = list(self.own_exits) == sorted(set(self.own_exits))
        if not ascending or any(not 1 <= E < self.n_layers for E in self.own_exits):
            found.append(
                f"model.own_exits: {shown(self.own_exits)}, must ascend from 1 layer or more and "
                f"stay below the model's {self.n_layers}"
            )
        if self.own_exit_mlp and not self.own_exits:
            found.append("model.own_exit_mlp: True without model.own_exits, name the exits")
        return found


def config_from_dict(fields: object) -> LlamaConfig:
    """Rebuild a LlamaConfig from `dataclasses.asdict`'s output after a round trip through JSON.

    Raises:
        ValueError: A field is missing or of another type, or no model has this shape.
    """
    config = build(LlamaConfig, fields)
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    return config
