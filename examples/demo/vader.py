"""An independent judge: VADER, a lexicon of how positive words are. It sees the answer alone."""

from __future__ import annotations

from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def score(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """From −1, all words negative, to +1, all positive."""
    return [analyzer().polarity_scores(text)["compound"] for text in completions]
