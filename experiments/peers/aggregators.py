"""torchjd's aggregators on the gradients of a benchmark, one call for each line that it reads.

    PYTHON experiments/peers/aggregators.py INPUTS.npz

INPUTS holds gradients [K, N] under a name each. A line is "AGGREGATOR NAME", like "UPGrad k8_n100000";
the answer is one line, the least cosine of a gradient with the result, when the call is done. Uses the
cores that it is given by its affinity.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
from torchjd import aggregation


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    inputs = np.load(sys.argv[1])
    gradients = {name: torch.from_numpy(inputs[name]) for name in inputs}
    made = {name: getattr(aggregation, name)() for name in ("UPGrad", "MGDA", "PCGrad", "Mean")}
    seen: dict[str, float] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        name, case = line.split()
        v = made[name](gradients[case])
        if line not in seen:
            seen[line] = least_cosine(gradients[case].double(), v.double())
        print(seen[line], flush=True)


def least_cosine(rows: torch.Tensor, v: torch.Tensor) -> float:
    return float((rows @ v / rows.norm(dim=1) / v.norm()).min())


if __name__ == "__main__":
    main()
