"""The variance of tomorrow by attention over a year of days, under a budget of remembered days."""
