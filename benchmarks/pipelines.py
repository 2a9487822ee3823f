"""What a Bayesian pipeline costs: processor time per text, as ratios to transformers' own pipeline in the same run.

`python -m benchmarks.pipelines` takes a small BERT from a configuration; `--model FOLDER --data_dir GLUE` a fine-tuned
one with two classes, and CoLA's sentences.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bayeformers import laplace, pipeline, to_bayesian
from benchmarks.harness import arguments, interleaved, median_ratio, report

TASK, BASELINE = "text-classification", "transformers"
WORDS = (
    "the of and to in is a that it was for on are as with his they at be this from have or by one had not but".split()
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def small(width: int = 256) -> tuple[Callable[[], Any], Any, list[str]]:
    """How a model of 4 layers is made, its tokenizer, and texts of 6 to 25 words."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    config = hf.BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=4 * width, num_labels=2,
    )  # fmt: skip
    texts = [" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(6 + i % 20)) for i in range(64)]

    def make() -> Any:
        torch.manual_seed(0)
        return hf.BertForSequenceClassification(config).eval()

    return make, tokenizer, texts


def fine_tuned(folder: str, data_dir: Path) -> tuple[Callable[[], Any], Any, list[str]]:
    """The same of a folder, with sentences of CoLA."""
    lines = (data_dir / "CoLA" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    auto: Any = hf.AutoModelForSequenceClassification
    return (
        lambda: auto.from_pretrained(folder).eval(),
        hf.AutoTokenizer.from_pretrained(folder),
        [line.split("\t")[3] for line in lines[:64]],
    )


def variants(make: Callable[[], Any], tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Pipelines by name; the first is transformers' own."""
    inputs = dict(tokenizer(texts[:32], return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    batches = [{**inputs, "labels": torch.arange(32) % 2}]
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": "cpu", "num_samples": 16}
    whole, head = (laplace.fit(make(), batches, subset=s, progress=False) for s in ("all", "last_layer"))
    last = to_bayesian(make(), delta=0.05, target_modules=["classifier"])
    return {
        BASELINE: hf.pipeline(TASK, model=make(), tokenizer=tokenizer, device="cpu"),
        "point estimate": pipeline(TASK, model=make(), **options),
        "linearised, head": pipeline(TASK, posterior=head, **options),
        "linearised, all layers": pipeline(TASK, posterior=whole, **options),
        "16 draws of the head, Laplace": pipeline(TASK, posterior=head, method="sample", **options),
        "16 draws of the head, variational": pipeline(TASK, model=last, **options),
        "16 draws of all layers": pipeline(TASK, model=to_bayesian(make(), delta=0.05), **options),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("--model", help="folder of a fine-tuned classifier with two classes; a small BERT without")
    parser.add_argument("--data_dir", type=Path, help="GLUE's folder, with CoLA/dev.tsv")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16], help="texts in a batch")
    parser.add_argument("--texts", type=int, default=64, help="texts of a round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make, tokenizer, texts = fine_tuned(args.model, args.data_dir) if args.model else small()
    pipes, texts = variants(make, tokenizer, texts), texts[: args.texts]
    rows: list[dict[str, str | float]] = []
    for size in args.batch_sizes:
        runs = {name: partial(pipe, texts, batch_size=size) for name, pipe in pipes.items()}
        times = interleaved(runs, args.repeats, warmup=1, clock=time.process_time)
        for name, values in times.items():
            milliseconds = 1000 * statistics.median(values) / len(texts)
            ratio = median_ratio(values, times[BASELINE])
            rows.append({"batch": size, "pipeline": name, "ms per text": milliseconds, "ratio": ratio})
    report("processor time per text / transformers' own pipeline", rows, args.json, repeats=args.repeats)


if __name__ == "__main__":
    main()
