"""What experiments share: data from packages, runs that resume, statistics, logs, result pages."""
