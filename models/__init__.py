"""What is computed: the Llama model, its stochastic depth, its sizes and its files."""
