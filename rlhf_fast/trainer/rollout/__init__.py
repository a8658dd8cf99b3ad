"""Answers sampled from the policy."""
