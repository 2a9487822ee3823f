"""Which score rises on unfamiliar text? Fine-tuned classifiers, sets of unfamiliar inputs, the AUROC of every score.

    python -m benchmarks.unfamiliar --checkpoint CKPT/trec-0 --task trec --data_dir DATA --output_dir OUT

DATA holds `glue/` with GLUE's official files, `trec/` and `clinc/`. A checkpoint is trained as `benchmarks.real_data`
does: on nine tenths of the training file in the order of the seed (the last part of the folder's name), on all of
CLINC150's `train`. Features of every set are read once and kept in OUT; the tables are made from them. Settings of the
scores are fixed; validation rows (the tenth that was held out) standardise them. Intervals are of 1,000 resamples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from bayeformers import metrics
from bayeformers.ood.densities import distance, from_moments, unit
from bayeformers.ood.features import POOLINGS, pooled, read_states
from bayeformers.ood.moments import Moments

Text = tuple[str, ...]
Array = NDArray[Any]
Sets = dict[str, list[Text]]

TREC = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
MOST_TRAINED, MOST_HELD_OUT, MOST_SHIFTED, FOREIGN = 7500, 3000, 600, 300
MAX_LENGTH = 128


# -- texts ------------------------------------------------------------------------------------------------------------


def read(data_dir: Path, task: str, split: str) -> tuple[list[Text], list[int]]:
    """Texts and classes of one split of a task."""
    if task == "clinc":
        data = json.loads((data_dir / "clinc/data_full.json").read_text(encoding="utf-8"))
        names = sorted({intent for _, intent in data["train"]})
        return [(text,) for text, _ in data[split]], [names.index(i) if i in names else -1 for _, i in data[split]]
    if task == "trec":
        lines = (data_dir / f"trec/{split}.txt").read_text(encoding="latin-1").splitlines()
        return [(line.split(" ", 1)[1],) for line in lines], [TREC.index(line.split(":", 1)[0]) for line in lines]
    folder, texts, label, header = {
        "cola": ("CoLA", (3,), 1, 0), "sst2": ("SST-2", (0,), 1, 1), "mrpc": ("MRPC", (3, 4), 0, 1),
        "qnli": ("QNLI", (1, 2), 0, 1), "stsb": ("STS-B", (7, 8), 0, 1), "ax": ("AX", (1, 2), 0, 1),
    }[task]  # fmt: skip
    name = "diagnostic" if task == "ax" else split
    rows = (data_dir / f"glue/{folder}/{name}.tsv").read_text(encoding="utf-8-sig").splitlines()[header:]
    cells = [row.split("\t") for row in rows]
    cells = [row for row in cells if len(row) > max(texts)]
    return [tuple(row[i] for i in texts) for row in cells], [int(row[label]) if header == 0 or task in ("sst2", "mrpc") else 0 for row in cells]


def foreign(data_dir: Path, task: str) -> Sets:
    """Texts of other corpora, pairs for a task of pairs."""
    if task == "mrpc":
        return {name: read(data_dir, name, "dev")[0] for name in ("qnli", "stsb", "ax")}
    found = {"cola": "dev", "sst2": "dev", "trec": "test", "clinc": "test"}
    single = {name: read(data_dir, name, split)[0] for name, split in found.items() if name != task}
    pairs = {name: read(data_dir, name, "dev")[0] for name in ("mrpc", "qnli", "stsb")}
    single |= {name: [text[:1] for text in pairs[name]] for name in ("mrpc", "stsb")}
    return single | {"questions": [text[:1] for text in pairs["qnli"]], "passages": [text[1:] for text in pairs["qnli"]]}


def sample(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Some rows, in an order of their own."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]


def shuffled(rows: Sequence[Text], seed: int = 1) -> list[Text]:
    """The words of every text in another order."""
    generator = np.random.default_rng(seed)
    return [tuple(" ".join(generator.permutation(text.split())) for text in row) for row in rows]


def shortened(rows: Sequence[Text]) -> list[Text]:
    """The first third of the words, at least two."""
    return [tuple(" ".join(text.split()[: max(2, len(text.split()) // 3)]) for text in row) for row in rows]


def lengthened(rows: Sequence[Text]) -> list[Text]:
    """Three rows after one another."""
    count = len(rows)
    return [
        tuple(" ".join(rows[(i + step) % count][part] for step in (0, 7, 19)) for part in range(len(rows[0])))
        for i in range(count)
    ]


def matched(rows: Sequence[Text], pool: Sequence[Text], lengths: Callable[[Sequence[Text]], list[int]]) -> list[Text]:
    """For each row another corpus' text of as many tokens, or of the nearest number, each used once."""
    generator, have = np.random.default_rng(2), np.array(lengths(pool), dtype=float)
    chosen = []
    for wanted in lengths(rows):
        off = np.abs(have - wanted)
        index = int(generator.choice(np.flatnonzero(off == off.min())))
        have[index] = np.inf
        chosen.append(pool[index])
    return chosen


def all_sets(data_dir: Path, task: str, seed: int, lengths: Callable[[Sequence[Text]], list[int]]) -> tuple[Sets, dict[str, list[int]]]:
    """Every set by name, and the classes of "train", "val" and "test"; what is unfamiliar is all else."""
    texts, classes = read(data_dir, task, "train")
    if task == "clinc":
        parts = {"train": (texts, classes), "val": read(data_dir, task, "val"), "test": read(data_dir, task, "test")}
    else:
        texts, classes = texts[:20_000], classes[:20_000]
        order, held = np.random.default_rng(seed).permutation(len(texts)), len(texts) // 10
        split = "test" if task == "trec" else "dev"
        parts = {"val": ([texts[i] for i in order[:held]], [classes[i] for i in order[:held]]), "test": read(data_dir, task, split)}
        parts["train"] = [texts[i] for i in order[held:]], [classes[i] for i in order[held:]]
    for name, most in (("train", MOST_TRAINED), ("val", MOST_HELD_OUT)):
        parts[name] = sample(parts[name][0], most, 3), sample(parts[name][1], most, 3)
    some, others = sample(parts["test"][0], MOST_SHIFTED, 5), foreign(data_dir, task)
    pool = [text for name in others for text in sample(others[name], 3000, 7)]
    found: Sets = {name: part[0] for name, part in parts.items()} | {name: sample(rows, FOREIGN, 5) for name, rows in others.items()}
    found |= {"matched": matched(some, pool, lengths), "shuffled": shuffled(some), "short": shortened(some), "long": lengthened(some)}
    if task == "clinc":
        found["oos_test"] = read(data_dir, task, "oos_test")[0]
    return found, {name: part[1] for name, part in parts.items()}


# -- features ---------------------------------------------------------------------------------------------------------


def features(model: Any, tokenizer: Any, rows: Sequence[Text], size: int = 32) -> dict[str, Array]:
    """"f" (N, layers, poolings, D), logits "z" (N, C) and numbers of tokens "n" (N,), in the order of the rows."""
    encoded = tokenizer(*map(list, zip(*rows, strict=True)), truncation=True, max_length=MAX_LENGTH)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    order, collate = np.argsort(lengths, kind="stable"), DataCollatorWithPadding(tokenizer)
    parts, logits = [], []
    for start in range(0, len(order), size):
        batch = dict(collate([{name: encoded[name][i] for name in encoded} for i in order[start : start + size]]))
        output, states = read_states(model, batch, None)
        pools = [[pooled(states[layer], batch, how) for how in POOLINGS[:3]] for layer in sorted(states)]
        parts.append(torch.stack([torch.stack(pool, 1) for pool in pools], 1))
        logits.append(output.logits.detach())
    back = np.argsort(order)
    return {"f": torch.cat(parts).numpy()[back], "z": torch.cat(logits).numpy()[back], "n": lengths}


def cached(checkpoint: Path, task: str, data_dir: Path, folder: Path) -> dict[str, dict[str, Array]]:
    """Features of every set, read from the files of an earlier run where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()

    def lengths(rows: Sequence[Text]) -> list[int]:
        return [len(ids) for ids in tokenizer(*map(list, zip(*rows, strict=True)), truncation=True, max_length=MAX_LENGTH)["input_ids"]]

    seed = int(checkpoint.name.split("-")[1]) if "-" in checkpoint.name else 0
    sets, classes = all_sets(data_dir, task, seed, lengths)
    for name, rows in sets.items():
        if not (folder / f"{name}.npz").exists():
            labels = {"y": np.array(classes[name])} if name in classes else {}
            np.savez(folder / f"{name}.npz", **features(model, tokenizer, rows), **labels)
    return {path.stem: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


if __name__ == "__main__":
    print("draft")
