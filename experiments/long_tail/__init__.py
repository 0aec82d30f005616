"""Classes with a long tail: how many examples of each a step learns from, by importance with floors."""
