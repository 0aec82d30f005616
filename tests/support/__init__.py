"""Oracles, cases and small models that several tests share."""
