"""Rows of preference pairs and prompts, and their tokens."""
