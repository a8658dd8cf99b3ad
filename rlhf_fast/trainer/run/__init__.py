"""A run's folder, and what a person sees of it."""
