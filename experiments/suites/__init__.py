"""RULER-like tasks, many questions on one context, arithmetic, real prose and outliers, at few bytes."""
