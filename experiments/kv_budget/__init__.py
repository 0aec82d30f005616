"""The main job: keep what matters of a context that is too long for the memory of the devices."""
