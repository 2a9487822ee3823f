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
from bayeformers.ood.densities import distance, from_moments
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
    labels = [int(row[label]) if task in ("cola", "sst2", "mrpc") else 0 for row in cells]
    return [tuple(row[i] for i in texts) for row in cells], labels


def foreign(data_dir: Path, task: str) -> Sets:
    """Texts of other corpora, pairs for a task of pairs."""
    if task == "mrpc":
        return {name: read(data_dir, name, "dev")[0] for name in ("qnli", "stsb", "ax")}
    found = {"cola": "dev", "sst2": "dev", "trec": "test", "clinc": "test"}
    single = {name: read(data_dir, name, split)[0] for name, split in found.items() if name != task}
    pairs = {name: read(data_dir, name, "dev")[0] for name in ("mrpc", "qnli", "stsb")}
    single |= {name: [text[:1] for text in pairs[name]] for name in ("mrpc", "stsb")}
    return single | {
        "questions": [text[:1] for text in pairs["qnli"]],
        "passages": [text[1:] for text in pairs["qnli"]],
    }


def sample(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Some rows, in an order of their own."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]


def shuffled(rows: Sequence[Text], seed: int = 1) -> list[Text]:
    """The words of every text in another order."""
    generator = np.random.default_rng(seed)
    return [tuple(" ".join(generator.permutation(text.split())) for text in row) for row in rows]


def replaced(rows: Sequence[Text]) -> list[Text]:
    """Every word drawn from those of all rows."""
    generator = np.random.default_rng(21)
    words = [word for row in rows for text in row for word in text.split()]
    return [tuple(" ".join(generator.choice(words, len(text.split()))) for text in row) for row in rows]


def mixed(rows: Sequence[Text]) -> list[Text]:
    """The second half of every text taken from another row."""
    generator, found = np.random.default_rng(22), []
    for i, row in enumerate(rows):
        other = rows[(i + 1 + generator.integers(len(rows) - 1)) % len(rows)]
        halves = [(a.split(), b.split()) for a, b in zip(row, other, strict=True)]
        found.append(tuple(" ".join(a[: (len(a) + 1) // 2] + b[len(b) // 2 :]) for a, b in halves))
    return found


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


def all_sets(
    data_dir: Path, task: str, seed: int, lengths: Callable[[Sequence[Text]], list[int]]
) -> tuple[Sets, dict[str, list[int]]]:
    """Every set by name, and the classes of "train", "val" and "test"; what is unfamiliar is all else."""
    texts, classes = read(data_dir, task, "train")
    if task == "clinc":
        parts = {"train": (texts, classes), "val": read(data_dir, task, "val"), "test": read(data_dir, task, "test")}
    else:
        texts, classes = texts[:20_000], classes[:20_000]
        order, held = np.random.default_rng(seed).permutation(len(texts)), len(texts) // 10
        split = "test" if task == "trec" else "dev"
        parts = {
            "val": ([texts[i] for i in order[:held]], [classes[i] for i in order[:held]]),
            "test": read(data_dir, task, split),
        }
        parts["train"] = [texts[i] for i in order[held:]], [classes[i] for i in order[held:]]
    for name, most in (("train", MOST_TRAINED), ("val", MOST_HELD_OUT)):
        parts[name] = sample(parts[name][0], most, 3), sample(parts[name][1], most, 3)
    some, others = sample(parts["test"][0], MOST_SHIFTED, 5), foreign(data_dir, task)
    pool = [text for name in others for text in sample(others[name], 3000, 7)]
    found: Sets = {name: part[0] for name, part in parts.items()} | {
        name: sample(rows, FOREIGN, 5) for name, rows in others.items()
    }
    found |= {
        "matched": matched(some, pool, lengths),
        "shuffled": shuffled(some),
        "short": shortened(some),
        "long": lengthened(some),
    }
    if task == "clinc":
        found |= {name: read(data_dir, task, name)[0] for name in ("oos_val", "oos_test")}
    held = parts["val"][0][:500]
    found |= {"made_up_shuffled": shuffled(held, 11), "made_up_replaced": replaced(held), "made_up_mixed": mixed(held)}
    return found, {name: part[1] for name, part in parts.items()}


# -- features ---------------------------------------------------------------------------------------------------------


def features(model: Any, tokenizer: Any, rows: Sequence[Text], size: int = 32) -> dict[str, Array]:
    """ "f" (N, layers, poolings, D), logits "z" (N, C) and numbers of tokens "n" (N,), in the order of the rows."""
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
        return [
            len(ids)
            for ids in tokenizer(*map(list, zip(*rows, strict=True)), truncation=True, max_length=MAX_LENGTH)[
                "input_ids"
            ]
        ]

    seed = int(checkpoint.name.split("-")[1]) if "-" in checkpoint.name else 0
    sets, classes = all_sets(data_dir, task, seed, lengths)
    for name, rows in sets.items():
        if not (folder / f"{name}.npz").exists():
            labels = {"y": np.array(classes[name])} if name in classes else {}
            np.savez(folder / f"{name}.npz", **features(model, tokenizer, rows), **labels)
    return {path.stem: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


# -- scores -----------------------------------------------------------------------------------------------------------


def logit_scores(logits: Array) -> dict[str, Array]:
    """Of the network's own logits (N, C), higher for the less familiar."""
    values = torch.tensor(logits, dtype=torch.float64)
    log_probs = values.log_softmax(-1)
    found = {
        "max probability": -log_probs.amax(-1).exp(),
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "max logit": -values.amax(-1),
        "energy": -values.logsumexp(-1),
    }
    return {name: score.numpy() for name, score in found.items()}


def place_scores(sets: dict[str, dict[str, Array]], layer: int, pooling: int) -> dict[str, dict[str, Array]]:
    """Marginal, class-wise and relative distances at one place, by set."""
    train = sets["train"]
    moments = Moments(int(train["y"].max()) + 1)
    moments.add(torch.tensor(train["f"][:, layer, pooling]), torch.tensor(train["y"]))
    names = ("marginal_mahalanobis", "mahalanobis", "relative_mahalanobis")
    tensors = from_moments(names, moments)
    return {
        part: {n: distance(n, torch.tensor(found["f"][:, layer, pooling]), tensors[n]).numpy() for n in names}
        for part, found in sets.items()
        if part != "train"
    }


def all_scores(sets: dict[str, dict[str, Array]]) -> tuple[dict[str, dict[str, Array]], dict[str, float]]:
    """Every score by name and set, and the weights of "auto"."""
    layers = range(1, sets["train"]["f"].shape[1])
    places = {(layer, how): place_scores(sets, layer, how) for layer in layers for how in range(3)}
    own = {part: logit_scores(found["z"]) for part, found in sets.items() if part != "train"}
    last, third, parts = max(layers), min(3, max(layers)), list(own)
    scores: dict[str, dict[str, Array]] = {n: {part: own[part][n] for part in parts} for n in own["val"]}
    scores["tokens"] = {part: sets[part]["n"].astype(float) for part in parts}
    for name, place, method in (
        ("Mahalanobis, last, first", (last, 0), "mahalanobis"),
        ("relative, last, first", (last, 0), "relative_mahalanobis"),
        ("Mahalanobis, third, mean", (third, 1), "mahalanobis"),
    ):
        scores[name] = {part: places[place][part][method] for part in parts}
    families = {
        "all, marginal": [{p: np.log(s[p]["marginal_mahalanobis"]) for p in parts} for s in places.values()],
        "all, relative": [{p: s[p]["relative_mahalanobis"] for p in parts} for s in places.values()],
        "energy, cut": [scores["energy"]],
    }
    for name, members in families.items():
        total = {part: sum(_standardized(member, part) for member in members) for part in parts}
        scores[name] = {part: values / total["val"].std() for part, values in total.items()}
    weights = _weights([scores[name] for name in families], parts)
    scores["auto"] = {
        part: sum(w * scores[name][part] for w, name in zip(weights, families, strict=True)) for part in parts
    }
    return scores, dict(zip(families, weights, strict=True))


def _standardized(member: dict[str, Array], part: str) -> Array:
    """As a `Part` of a density does: by the validation rows, cut at the most familiar of them."""
    held = member["val"]
    return np.asarray((np.maximum(member[part], held.min()) - held.mean()) / held.std())


def _weights(families: list[dict[str, Array]], parts: list[str]) -> tuple[float, ...]:
    made = [part for part in parts if part.startswith("made_up_")]
    grid = [(a / 4, b / 4, (4 - a - b) / 4) for a in range(4, -1, -1) for b in range(4 - a, -1, -1)]

    def value(weights: tuple[float, ...]) -> float:
        total = {p: sum(w * f[p] for w, f in zip(weights, families, strict=True)) for p in ("val", *made)}
        return float(np.mean([auroc(total["val"], total[part]) for part in made]))

    return max(grid, key=value)


def auroc(familiar: Array, unfamiliar: Array) -> float:
    """P(unfamiliar > familiar) + P(equal) / 2, by sorting once."""
    ordered = np.sort(familiar)
    below = np.searchsorted(ordered, unfamiliar, "left") + np.searchsorted(ordered, unfamiliar, "right")
    return float(below.mean() / (2 * len(familiar)))


def table(scores: dict[str, dict[str, Array]], num_resamples: int = 1000) -> str:
    """AUROC of every score and set with its interval; the last rows are differences of "auto", resampled together."""
    generator = np.random.default_rng(0)
    sets = [p for p in scores["auto"] if p not in ("val", "test") and not p.startswith("made_up_")]
    inside = generator.integers(len(scores["auto"]["test"]), size=(num_resamples, len(scores["auto"]["test"])))
    outside = {
        p: generator.integers(len(scores["auto"][p]), size=(num_resamples, len(scores["auto"][p]))) for p in sets
    }
    values = {
        (name, p): np.array([
            auroc(by["test"], by[p]),
            *(auroc(by["test"][i], by[p][j]) for i, j in zip(inside, outside[p], strict=True)),
        ])
        for name, by in scores.items()
        for p in sets
    }  # fmt: skip
    rows = {name: [values[name, p] for p in sets] for name in scores}
    for other in ("max probability", "max logit"):
        rows[f"auto minus {other}"] = [values["auto", p] - values[other, p] for p in sets]
    lines = [f"| score | {' | '.join(sets)} |", "| --- |" + " --- |" * len(sets)]
    for name, row in rows.items():
        cells = [f"{v[0]:.3f} [{np.quantile(v[1:], 0.025):.3f}, {np.quantile(v[1:], 0.975):.3f}]" for v in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Read what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder TASK-SEED with model and tokenizer")
    parser.add_argument("--task", choices=("cola", "mrpc", "sst2", "trec", "clinc"), required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="holds glue/, trec/ and clinc/")
    parser.add_argument("--output_dir", type=Path, required=True, help="holds the features of a run and its table")
    args = parser.parse_args(argv)
    sets = cached(args.checkpoint, args.task, args.data_dir, args.output_dir / args.checkpoint.name)
    scores, weights = all_scores(sets)
    test, lines = sets["test"], [f"weights of auto: {weights}"]
    lines.append(f"accuracy {float((test['z'].argmax(1) == test['y']).mean()):.3f}")
    log_probs = torch.tensor(test["z"]).double().log_softmax(-1)[torch.arange(len(test["y"])), torch.tensor(test["y"])]
    lines += [f"NLL {-float(log_probs.mean()):.3f}", "", table(scores)]
    if "oos_test" in sets:
        is_ood = [0] * len(test["n"]) + [1] * len(sets["oos_test"]["n"])
        for name in ("max probability", "max logit", "energy", "auto"):
            both = np.r_[scores[name]["test"], scores[name]["oos_test"]]
            rates = metrics.ood_aupr(both, is_ood), metrics.fpr_at_95_tpr(both, is_ood)
            lines.append(f"{name}: AUPR {rates[0]:.3f}, FPR95 {rates[1]:.3f}")
    text = "\n".join(lines)
    (args.output_dir / f"{args.checkpoint.name}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
