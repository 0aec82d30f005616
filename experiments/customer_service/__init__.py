"""Customer service: many customers' requests share one model, its time and its memory."""
