"""Other libraries' progress bars and log lines: off around our own calls, as they were after."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Bars of datasets and transformers hide those that matter; the log lines of datasets say what
    is raised. Also a decorator: `@quiet()`."""
    of_datasets = not datasets.are_progress_bars_disabled()
    of_transformers = transformers_logging.is_progress_bar_enabled()
    of_hub = not are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()  # the hub's too
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        with warnings.catch_warnings():  # where a variable has the say
            warnings.simplefilter("ignore")
            if of_datasets:
                datasets.enable_progress_bars()
            if of_transformers:
                transformers_logging.enable_progress_bar()
            if not of_hub:
                disable_progress_bars()
