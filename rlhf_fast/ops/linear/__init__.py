"""Ops from hidden states: the head's product, a chunk of rows at a time."""
