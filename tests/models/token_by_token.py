"""The Llama's layers written out for one token at a time, with keys and values in plain lists."""

import math

import torch

from models.rope import apply_rope


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
        attention, shared = block.attention, config.n_heads // config.n_kv_heads
        for i, h in enumerate(states):
            cos, sin = model.rope_cos[None, None, [i]], model.rope_sin[None, None, [i]]
            x = block.attention_norm(h)
            q = apply_rope(attention.split(attention.wq(x)), cos, sin)
            keys.append(apply_rope(attention.split(attention.wk(x)), cos, sin))
            values.append(attention.split(attention.wv(x)))
            attended = [
                other
                for other in range(i + 1)
                if documents is None or documents[other] == documents[i]
            ]
            k = torch.cat([keys[other] for other in attended], 2).repeat_interleave(shared, 1)
            v = torch.cat([values[other] for other in attended], 2).repeat_interleave(shared, 1)
            scores = (q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)).softmax(-1)
            out = h + attention.wo((scores @ v).transpose(1, 2).flatten(2))
            out = out + block.feed_forward(block.ffn_norm(out))
            after.append(h + w[i] * (out - h))
        states = after
        outputs.append([h[0, 0] for h in states])
    return outputs
