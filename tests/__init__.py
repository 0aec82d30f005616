"""The tests mirror the library; `support` holds what several of them share."""
