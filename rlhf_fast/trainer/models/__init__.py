"""Policies, critics and reward models out of transformers' models."""
