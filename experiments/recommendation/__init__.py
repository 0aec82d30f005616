"""Films for a person by attention over what the person saw, under a budget of remembered films."""
