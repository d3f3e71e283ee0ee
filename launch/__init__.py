"""Starting the commands: `skipstone VERB`, the end of torchrun, scripts for a machine or SLURM."""

__version__ = "0.1.0"
