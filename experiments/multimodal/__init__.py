"""Pictures, captions and spoken captions of stamps under one budget of tokens."""
