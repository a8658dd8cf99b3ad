"""The trainer: a reward model from preference pairs, then PPO against it."""
