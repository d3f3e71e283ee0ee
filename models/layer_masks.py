"""Which part of a batch each layer computes in training: rows, tokens, documents and routers."""

from dataclasses import dataclass, replace

from torch import Tensor

from models.attention_mask import AttentionMask, window_mask
from models.layer_dropout import KeptRows
from models.router import Routing
from models.token_depth import TokenLayers


@dataclass(frozen=True)
class LayerMasks:
    """Which rows and tokens run each layer, and what they attend to; by default all of them."""

    kept_rows: KeptRows | None = None
    """Rows that each layer runs on (stochastic depth); None: all."""
    token_layers: TokenLayers | None = None
    """Tokens that run each layer; the others keep their state. None: all."""
    documents: AttentionMask | None = None
    """Keeps attention within documents, and a sliding window; None: it is causal."""
    routing: Routing | None = None
    """Limits the tokens that routers let run, and records their gates; None: no limit."""

    def within(self, window: int | None, h: Tensor) -> "LayerMasks":
        """Return these for a model of such a sliding window, in tokens, that runs h: (b, seq, dim).

        A row that is no longer than the window is causal and nothing else.
        """
        if self.documents is not None:
            assert self.documents.window == window, "the mask of documents lacks the window"
            return self
        if window is None or h.shape[1] <= window:
            return self
        return replace(self, documents=window_mask(window, h.shape[1], h.device))

    def attention(self, l: int, p: Tensor | None) -> AttentionMask | None:
        """Return the attention mask of layer l, which a router runs with probability p.

        Args:
            l: Layer index.
            p: (batch, seq); None: the layer has no router.

        Returns:
            None: attention is causal and nothing else.
        """
        if p is None or self.routing is None:
            return self.documents
        return self.routing.admit(l, p, self.documents)

    def select(self, l: int, before: Tensor, after: Tensor) -> Tensor:
        """Return x_{l+1}: `after` of the tokens that run layer l, `before` of the others."""
        tokens = self.token_layers
        return after if tokens is None else tokens.select(l, before, after)


NO_MASKS = LayerMasks()
"""Every token of every row runs every layer, under causal attention."""
