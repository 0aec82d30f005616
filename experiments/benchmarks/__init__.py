"""Benchmarks: one module each, one format (`_report`) for all."""
