"""A balance while the data change: what was learned in one domain at the start of another."""
