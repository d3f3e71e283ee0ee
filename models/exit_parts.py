"""Parts that one exit has of its own in front of the shared LM head: EE-Tuning.

EE-LLM (arXiv 2312.04916) and EE-Tuning (arXiv 2402.00518): a norm, or a feed-forward layer and a
norm. Theirs may have an output embedding of their own as well; ours do not.
"""

import torch
from torch import Tensor, nn

from models.block import FeedForward, RMSNorm, TransformerBlock, feed_forward_part
from models.config import LlamaConfig


class ExitParts(nn.Module):
    """Reads norm(h), or norm(h + feed_forward(ffn_norm(h))), for the exit after E layers.

    Where the model's layers norm what their parts give, so does this feed-forward layer.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps) if config.own_exit_mlp else None
        self.feed_forward = FeedForward(config) if config.own_exit_mlp else None

    def forward(self, h: Tensor) -> Tensor:
        """Return the head's input for h = x_E: (..., dim), same shape."""
        if self.feed_forward is not None and self.ffn_norm is not None:
            h = h + feed_forward_part(h, self.ffn_norm, self.feed_forward, self.norm_first)
        x: Tensor = self.norm(h)
        return x

    @torch.no_grad()
    def copy_from(self, norm: RMSNorm, block: TransformerBlock) -> None:
        """Copy the model's own parts into these, the start of EE-Tuning.

        Args:
            norm: The final norm.
            block: The last layer, whose feed-forward and its norm are copied.
        """
        copies: list[tuple[nn.Module, nn.Module]] = [(self.norm, norm)]
        if self.feed_forward is not None and self.ffn_norm is not None:
            copies += [(self.ffn_norm, block.ffn_norm), (self.feed_forward, block.feed_forward)]
        for own, original in copies:
            for parameter, value in zip(own.parameters(), original.parameters(), strict=True):
                parameter.copy_(value)
