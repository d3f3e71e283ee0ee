"""Plan a run without a GPU: memory, kernels, the dry run."""
