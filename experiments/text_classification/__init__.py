"""Sentiment of short texts: attention over scored features, a transformer with a token budget."""
