"""Budgets under noise, loss, attack and stuffing, and how the groups of texts fare."""
