"""Experiments on real models and data; a module's docstring holds its command and figures."""
