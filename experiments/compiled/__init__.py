"""Kernels and programs, compiled by the accelerators' own compilers, without accelerators."""
