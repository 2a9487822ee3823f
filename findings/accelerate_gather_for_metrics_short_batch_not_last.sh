#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.13.0: at the end of a pass Accelerator.gather_for_metrics keeps only the
# first (number of rows mod batch size) rows of the last batch. A batch sampler whose short batch is
# not the last one (say, one that groups rows by length) ends on a full batch, which is cut as well.
# A good guess would have been that rows are dropped only where a process was given repeated ones,
# so that one process, which repeats nothing, drops none. Plain gather keeps all rows.
# Seen, one process, 10 rows in batches of 4: short batch last, 10 rows; short batch first, 8 rows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import accelerate
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset


class Batches:
    batch_size = 4
    drop_last = False

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


print("torch", torch.__version__, "accelerate", accelerate.__version__)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 1
dataset = TensorDataset(torch.arange(10))
orders = {
    "last": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]],
    "first": [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]],
}
metrics = {}
for place, batches in orders.items():
    loader = accelerator.prepare(DataLoader(dataset, batch_sampler=Batches(batches)))
    gathered, metrics[place] = [], []
    for (rows,) in loader:
        gathered += accelerator.gather(rows).tolist()
        metrics[place] += accelerator.gather_for_metrics(rows).tolist()
    print(f"short batch {place}: gather {gathered}")
    print(f"short batch {place}: gather_for_metrics {metrics[place]}")
    assert gathered == list(range(10))
assert metrics["last"] == list(range(10))
assert metrics["first"] == list(range(8))
PY
