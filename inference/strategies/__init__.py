"""The decoding strategies, each in the file of its name; `registry` lists them.

The other files are shared: `drafting`, `ngram`, `reduced_head` and `agreement` by strategies that
draft, `row_exits`, `confidence`, `gate_classifiers`, `jump_maps` and `beta_mixture` by those with
early exits, `kept_layers` by those that leave layers out.
"""
