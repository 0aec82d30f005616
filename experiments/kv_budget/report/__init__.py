"""What a run shows, in the terminal and as files."""

from experiments.kv_budget.report.output import print_table, write

__all__ = ["print_table", "write"]
