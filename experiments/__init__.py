"""Experiments on real models and data; a module's docstring holds its command and figures."""

import sys

if sys.argv[:1] == ["-m"]:  # as long as python -m looks for the command's module
    from experiments.harness import interrupt

    interrupt.until_the_command()
