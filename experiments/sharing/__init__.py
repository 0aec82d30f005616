"""Several tasks on one set of resources: memory, batch and attention, divided by importance."""
