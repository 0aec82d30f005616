"""Attention over packed pages, by platform: XLA loops, Triton for GPUs, Mosaic for TPUs."""
