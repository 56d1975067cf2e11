"""Splitwise's measurements, of Llama2-70B and BLOOM on vLLM of 2023.

Mutinifni/splitwise-sim @ 8f99e7d, data/perf_model.csv (MIT), one row for each run. Left
out: Llama2-70B TP2 with 64 prompts of 512, which implies 6-9 times the peak FLOPs; and
the power-capped rows, which are 1.3 times others and no measurements.
"""

import csv
import random
from collections import defaultdict

import pytest

SYSTEMS = [
    ("llama2-70b", "a100-80gb", 2),
    ("llama2-70b", "a100-80gb", 4),
    ("llama2-70b", "a100-80gb", 8),
    ("llama2-70b", "h100-80gb", 2),
    ("llama2-70b", "h100-80gb", 4),
    ("llama2-70b", "h100-80gb", 8),
    ("bloom-176b", "a100-80gb", 8),
    ("bloom-176b", "h100-80gb", 8),
]


def read_runs(shared_dir):
    """Rows (prompt, batch, output, prompt s, token s) by system."""
    file = shared_dir / "data" / "splitwise" / "perf_model.csv"
    if not file.exists():
        pytest.skip(f"no measurements: {file} is missing")
    found = defaultdict(list)
    with file.open() as lines:
        for row in csv.DictReader(lines):
            key = row["model"], row["hardware"], int(row["tensor_parallel"])
            sizes = [int(row[x]) for x in ("prompt_size", "batch_size", "token_size")]
            times = [float(row[x]) / 1000 for x in ("prompt_time", "token_time")]
            impossible = key[::2] == ("llama2-70b", 2) and sizes[:2] == [512, 64]
            if not impossible:
                found[key].append((*sizes, *times))
    return found


def splits(rows):
    """(those kept, those left out): 80:20 at random, five times."""
    for seed in range(5):
        mixed = random.Random(seed).sample(rows, len(rows))
        cut = len(rows) * 4 // 5
        yield mixed[:cut], mixed[cut:]
