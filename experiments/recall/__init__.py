"""Associative recall: what was said early is asked late, learned within a part of the tiles."""
