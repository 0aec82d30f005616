"""Translation of interface strings in two directions, with half of the attention's tiles."""
