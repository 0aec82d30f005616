"""Fine-tuning a real model with attention that computes half of its tiles."""
