"""The bench: every op of the registry beside its peers. Start at run.py."""
