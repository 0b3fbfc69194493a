"""Does the loader's memory grow with the data? Reads N and 10 N rows of each format and compares the peaks.

Run as `python benchmarks/loader_memory.py [--rows N]`. Each measurement is a process of its own: `traced` is the peak of
Python's and NumPy's allocations while iterating (tracemalloc), `arrow` the peak of pyarrow's own pool, `resident` the growth of
the process's resident set from before the first batch to its largest after any. The Parquet file is one row group, the hardest
case: a reader that takes whole column chunks holds all of it. The small file (5,000 rows, 10 MB) already fills every buffer:
pyarrow holds a page and a dictionary of 1 MiB each per column. Prints one line per format, and ends with exit code 1 when the
traced or the arrow peak grows by more than 10 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MAX_GROWTH = 1.10
FORMATS = ("parquet", "jsonl", "csv")
MEASURE = """
import json, psutil, sys, tracemalloc
import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from nexus.data.loader import SmartBatchLoader

model = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<eos>": 2}, unk_token="<unk>"))
model.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
loader = SmartBatchLoader([sys.argv[1]], tokenizer=tokenizer, batch_size=4, max_length=512, shuffle_seed=0)
process = psutil.Process()
before = resident = process.memory_info().rss
tracemalloc.start()
rows = 0
for batch in loader:
    rows += len(batch.row_ids)
    resident = max(resident, process.memory_info().rss)
peak = tracemalloc.get_traced_memory()[1]
print(json.dumps({"rows": rows, "traced": peak, "arrow": pa.default_memory_pool().max_memory(), "resident": resident - before}))
"""


def write_rows(path: Path, rows: int) -> None:
    """Rows of two texts of 10 to 20 random words of 64 letters, so that neither a dictionary nor a codec makes the file small."""
    rng = random.Random(0)

    def words() -> str:
        return " ".join(f"{rng.getrandbits(256):064x}" for _ in range(rng.randint(10, 20)))

    table = [{"question": words(), "answer": words()} for _ in range(rows)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(table)


def measure(path: Path) -> dict[str, int]:
    """Peaks in bytes of one process that reads `path` once."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    peaks: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return peaks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=int, default=5000, help="rows of the small file; the large one has ten times as many"
    )
    rows = parser.parse_args().rows
    grew = False
    with tempfile.TemporaryDirectory() as folder:
        for ending in FORMATS:
            peaks = []
            for count in (rows, 10 * rows):
                path = Path(folder) / f"{count}.{ending}"
                write_rows(path, count)
                peaks.append(measure(path))
                assert peaks[-1]["rows"] == count, "the loader lost rows"
            small, large = peaks
            figures = [
                f"{name} {small[name] / 2**20:.1f} -> {large[name] / 2**20:.1f} MiB"
                for name in ("traced", "arrow", "resident")
            ]
            factors = [large[name] / max(1, small[name]) for name in ("traced", "arrow")]
            grew |= max(factors) > MAX_GROWTH
            print(f"{ending:8} {rows} -> {10 * rows} rows: {', '.join(figures)}; growth x{max(factors):.3f}")
    return 1 if grew else 0


if __name__ == "__main__":
    sys.exit(main())
