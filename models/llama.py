"""The Llama decoder, written to be read top to bottom.

Independent of ranks, losses, optimizers, files and flags: parallelism is applied from outside. Its
verbs are `embed`, `run_layers` and `exit_logits`; training, drafting and verifying all
call the one loop over layers in `run_layers`, for which `inference/engine/fused.py` has a stand-in.
Rotary embeddings are half-split as in Hugging Face checkpoints: weights pass by renaming alone.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention_mask import document_mask
from models.block import KVCache, LayerKV, RMSNorm, TransformerBlock, open_cache
from models.config import LlamaConfig
from models.exit_parts import ExitParts
from models.initialization import initial_value
from models.layer_dropout import KeptRows, choice_at, run_kept_rows
from models.layer_masks import NO_MASKS, LayerMasks
from models.rope import rope_frequencies
from models.router import Router, Routing, route
from models.token_depth import TokenLayers

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class SkippedParts:
    """Layers l whose attention, or feed-forward part, is left out; a layer may be in both."""

    attention: frozenset[int] = frozenset()
    feed_forward: frozenset[int] = frozenset()

    def __or__(self, other: "SkippedParts") -> "SkippedParts":
        """Leave out what either leaves out."""
        return SkippedParts(
            self.attention | other.attention, self.feed_forward | other.feed_forward
        )


NOTHING = SkippedParts()
"""Skips nothing."""


def whole_layers(layers: Collection[int]) -> SkippedParts:
    """Leave out both parts of some layers l."""
    return SkippedParts(frozenset(layers), frozenset(layers))


class Hidden(NamedTuple):
    """What a forward pass returns for the losses, each (batch, seq, dim), in ascending l."""

    exits: dict[int, Tensor]
    """{l: norm(x_{l+1})}, see `Llama.before_head`; logits are F.linear(that, model.head_weight)."""
    gates: dict[int, Tensor]
    """{l: the probability that layer l runs, (batch, seq) fp32}; empty without routers."""


class Llama(nn.Module):
    """A decoder whose every layer can be an exit: one final norm and one LM head serve them all.

    LayerSkip (arXiv 2404.16710), section 4.1: the exit after layer l reads x_{l+1} through the
    same g = head(norm(.)) as the last layer, so a checkpoint is a plain Llama checkpoint. Exits in
    `config.own_exits` have `ExitParts` in place of that norm; the last layer never has.
    """

    def __init__(self, config: LlamaConfig) -> None:
        """Build the modules, under `torch.device("meta")` if `init_weights` is to follow."""
        super().__init__()
        self.config = config
        self.fingerprint: str | None = None
        """Of the weights as stored, see `models.fingerprint`; None if they were not loaded."""
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict(
            {str(l): TransformerBlock(config) for l in range(config.n_layers)}
        )
        routed = range(config.n_layers if config.router != "none" else 0)
        self.routers = nn.ModuleDict({str(l): Router(config) for l in routed})
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.own_exits = nn.ModuleDict({str(E): ExitParts(config) for E in config.own_exits})
        self.lm_head: nn.Module | None = (
            None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        )
        table = torch.empty(config.max_seq_len, config.head_width)
        self.register_buffer("rope_cos", table, persistent=False)
        self.register_buffer("rope_sin", table.clone(), persistent=False)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.fill_rope_table()

    @property
    def head_weight(self) -> Tensor:
        """The LM head's weight, (vocab, dim): the embedding's when they are tied."""
        weight = self.tok_embeddings.weight if self.lm_head is None else self.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    def block(self, l: int) -> TransformerBlock:
        """Return layer l."""
        block = self.layers[str(l)]
        assert isinstance(block, TransformerBlock)
        return block

    def gate(self, l: int, h: Tensor) -> Tensor | None:
        """Return the probability that layer l runs, (batch, seq), for x_l; None: it always does."""
        return self.routers[str(l)](h) if self.routers else None

    def fill_rope_table(self) -> None:
        """Write the rotary table; call again after `to_empty`, which leaves it undefined."""
        if self.rope_cos.is_meta:
            return
        config = self.config
        frequencies = rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
        positions = torch.arange(config.max_seq_len, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies).repeat(1, 2)
        self.rope_cos.copy_(angles.cos())
        self.rope_sin.copy_(angles.sin())

    @torch.no_grad()
    def init_weights(
        self, seed: int, write: Callable[[Tensor, Tensor], object] = Tensor.copy_
    ) -> None:
        """Initialise every parameter and the rotary table, see `models.initialization`.

        Args:
            seed: Any non-negative integer.
            write: Called as write(parameter, full_value); a sharded model passes its own.
        """
        for name, parameter in self.named_parameters():
            write(parameter, initial_value(name, parameter, self.config, seed))
        self.fill_rope_table()

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up tokens: (batch, seq) int64, giving x_0: (batch, seq, dim)."""
        h: Tensor = self.tok_embeddings(tokens)
        return h

    def run_layers(
        self,
        h: Tensor,
        start: int,
        stop: int,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        masks: LayerMasks = NO_MASKS,
        skipped: SkippedParts = NOTHING,
        exit_layers: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run layers start, ..., stop - 1: the one loop over layers in the house.

        Args:
            h: (batch, seq, dim), the input x_start of layer `start`.
            start: First layer index l to run.
            stop: One past the last layer index to run.
            positions: (batch, seq) int64, needed with `cache`; None is 0, ..., seq - 1 in each row.
            cache: Keys and values of earlier tokens, written as the layers run.
            masks: Which rows and tokens run each layer, and what they attend to; not with `cache`.
            skipped: Parts of layers that no row runs, when decoding; they write no keys and values.
            exit_layers: Layer indices l whose output x_{l+1} is returned as well.

        Returns:
            x_stop, (batch, seq, dim), and {l: x_{l+1}} for l in `exit_layers`.
        """
        cos, sin = self.rotary(positions, h)
        slots, layer_kv = open_cache(cache, positions)
        if cache is None:
            masks = masks.within(self.config.sliding_window, h)
        mask = slots if masks.documents is None else masks.documents.mask
        exits = {}
        for l in range(start, stop):
            p = self.gate(l, h)
            own_mask = masks.attention(l, p)
            if masks.kept_rows is not None or own_mask is not masks.documents:
                choice = choice_at(l, masks.kept_rows)
                out = run_kept_rows(self.block(l), h, cos, sin, choice, own_mask)
            else:
                out = self._run_block(l, h, cos, sin, mask, layer_kv, skipped)
            h = masks.select(l, h, route(h, out, p))
            if l in exit_layers:
                exits[l] = h
        return h, exits

    def _run_block(
        self,
        l: int,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: "Tensor | BlockMask | None",
        layer_kv: Callable[[int], LayerKV] | None,
        skipped: SkippedParts,
    ) -> Tensor:
        kv = None if layer_kv is None else layer_kv(l)
        if skipped is NOTHING:
            out: Tensor = self.block(l)(h, cos, sin, mask, kv)
            return out
        attend, feed = l not in skipped.attention, l not in skipped.feed_forward
        if not attend and not feed:
            return h
        return self.block(l)(h, cos, sin, mask, kv, attend=attend, feed=feed)

    def write_keys_and_values(
        self, h: Tensor, start: int, stop: int, *, positions: Tensor, cache: KVCache
    ) -> None:
        """Fill the cache of layers start, ..., stop - 1 as if h were the input of each of them.

        State propagation of CALM (arXiv 2207.07061, section 3.1): a token that exited early passes
        through each later layer's own norm and key and value projections, and nothing else.

        Args:
            h: (batch, seq, dim), the states at which the tokens exited.
            start: First layer index l to write.
            stop: One past the last.
            positions: (batch, seq) int64.
            cache: Written to.
        """
        cos, sin = self.rotary(positions, h)
        _, layer_kv = cache.at(positions)
        for l in range(start, stop):
            block = self.block(l)
            k, v = block.attention.keys_and_values(block.attention_input(h), cos, sin)
            layer_kv(l).update(k, v)

    def rotary(self, positions: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (batch or 1, 1, seq, head_dim), in the dtype of h.

        Args:
            positions: (batch, seq) int64; None means 0, 1, ..., seq - 1 in every row.
            h: (batch, seq, dim).
        """
        if positions is None:
            seq = h.shape[1]
            cos, sin = self.rope_cos[None, None, :seq], self.rope_sin[None, None, :seq]
        else:
            cos, sin = self.rope_cos[positions].unsqueeze(1), self.rope_sin[positions].unsqueeze(1)
        return cos.to(h.dtype), sin.to(h.dtype)

    def before_head(self, h: Tensor, E: int | None = None) -> Tensor:
        """Return the head's input for h: (..., dim), same shape.

        Args:
            h: x_E.
            E: Layers run; None where h is x_L, or stands for it.
        """
        x: Tensor = self.own_exits[str(E)](h) if E in self.config.own_exits else self.norm(h)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Return logits, (..., vocab), for the output of `before_head`: (..., dim)."""
        return F.linear(x, self.head_weight) if self.lm_head is None else self.lm_head(x)

    def exit_logits(self, h: Tensor, E: int | None = None) -> Tensor:
        """Apply g, the norm and the shared head, to h = x_E: (..., dim); logits: (..., vocab)."""
        return self.head(self.before_head(h, E))

    def forward(
        self,
        tokens: Tensor,
        *,
        exit_layers: Collection[int],
        kept_rows: KeptRows | None = None,
        documents: Tensor | None = None,
        token_layers: TokenLayers | None = None,
        capacity: float = 1.0,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Hidden:
        """Run the layers up to the deepest exit, and return what the head reads at each exit.

        The head is left to the caller, so that a loss can be computed in chunks of tokens.

        Args:
            tokens: (batch, seq) int64.
            exit_layers: Layer indices l of the exits.
            kept_rows: Stochastic depth's choice for this microbatch; None runs every layer.
            documents: (batch, seq) int64, the number of each token's document in its row, which
                attention stays within; None: attention is causal and nothing else.
            token_layers: Which tokens run each layer; the others keep their state. None: all.
            capacity: Share of a row's tokens that a layer with a router runs at most.
            positions: As in `run_layers`.
            cache: As in `run_layers`; then without kept_rows, documents and token_layers.
        """
        routing, window = Routing(capacity), self.config.sliding_window
        document_masks = None if documents is None else document_mask(documents, window)
        masks = LayerMasks(kept_rows, token_layers, document_masks, routing)
        _, outputs = self.run_layers(
            self.embed(tokens), 0, max(exit_layers, default=-1) + 1,
            positions=positions, cache=cache, masks=masks, exit_layers=exit_layers,
        )  # fmt: skip
        exits = {l: self.before_head(x, l + 1) for l, x in outputs.items()}
        return Hidden(exits, routing.gates)
