"""The layers written out for one token at a time, with keys and values in plain lists."""

import math

import torch

from models.rope import apply_rope


def normed(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def heads(x, norm, config):
    """Return (1, heads, 1, head_width), RMS-normed as a whole or by head where there is a norm."""
    if config.qk_norm == "full" and norm is not None:
        x = normed(x, norm)
    parts = x[0, 0].split(config.head_width)
    if config.qk_norm == "head" and norm is not None:
        parts = [normed(part, norm) for part in parts]
    return torch.stack(list(parts))[None, :, None]


def part(h, norm, function, config):
    """Return what a part adds to h."""
    if config.norm_position == "pre":
        return function(normed(h, norm))
    return normed(function(h), norm)


def token_by_token(model, row, weights, documents=None):
    """Return [l][position] -> x_{l+1} of one row: (seq,) int64, each (dim,).

    Each layer adds weights(l, x_l of each token)[position] times what it computes; a token of
    weight 0 keeps its state, from which its key and value are made all the same. With `documents`,
    a list, tokens attend within their own document.
    """
    config = model.config
    states = [model.embed(row[None, [i]]) for i in range(len(row))]
    outputs = []
    for l in range(config.n_layers):
        block, keys, values, after = model.block(l), [], [], []
        w = weights(l, [h[0, 0] for h in states])
        for i, h in enumerate(states):
            attended = [
                other
                for other in range(max(0, i + 1 - (config.sliding_window or i + 1)), i + 1)
                if documents is None or documents[other] == documents[i]
            ]

            def attention(x, i=i, attended=attended, block=block, keys=keys, values=values):
                cos, sin = model.rope_cos[None, None, [i]], model.rope_sin[None, None, [i]]
                own, shared = block.attention, config.n_heads // config.n_kv_heads
                q = apply_rope(heads(own.wq(x), own.q_norm, config), cos, sin)
                keys.append(apply_rope(heads(own.wk(x), own.k_norm, config), cos, sin))
                values.append(heads(own.wv(x), None, config))
                k = torch.cat([keys[other] for other in attended], 2).repeat_interleave(shared, 1)
                v = torch.cat([values[other] for other in attended], 2).repeat_interleave(shared, 1)
                scores = (q @ k.transpose(-1, -2) / math.sqrt(config.head_width)).softmax(-1)
                return own.wo((scores @ v).transpose(1, 2).flatten(2))

            out = h + part(h, block.attention_norm, attention, config)
            out = out + part(out, block.ffn_norm, block.feed_forward, config)
            after.append(h + w[i] * (out - h))
        states = after
        outputs.append([h[0, 0] for h in states])
    return outputs
