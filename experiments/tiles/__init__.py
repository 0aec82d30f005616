"""Attention over a part of its tiles: a prefill, its levels, fine-tuning, training from scratch."""
