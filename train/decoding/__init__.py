"""Greedy continuations of held-out prompts while a model trains: what drafts would gain."""
