"""Scores of tokens, heads and layers against what ablation says of them."""
