"""Drop-in losses for other trainers: one module each, imported only by who uses that trainer.

``trl``, ``verl`` and ``openrlhf`` hold functions with the framework's own names and signatures that
call the ops of this package, and ``patch()``, which puts them in the place of the framework's.
"""
