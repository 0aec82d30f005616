"""A crossing under a budget of vehicles: whom a driver attends to, at one price over scenes."""
