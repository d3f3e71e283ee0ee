"""What is computed: the Llama model, its stochastic depth, its sizes and its files.

Imports no other package of ours, except in the command `models.convert`, which reads and writes a
model together with its tokenizer.
"""
