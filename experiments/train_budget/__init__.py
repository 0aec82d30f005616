"""A language model from scratch on real texts, with attention to a part of its tiles."""
