"""Seconds of generating with S = 8 draws, relative to plain generation: python -m benchmarks.generation

A Llama of 100 M parameters with random weights and LoRA (r = 8 on q and v), batch 1, 24 new tokens, greedy. Every
variant runs once in each round, first on one thread and then on two.
"""

import statistics
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import bayeformers
from benchmarks.harness import arguments, interleaved, median_ratio, report

PLAIN, LOOP = "plain, one answer", "draws in a loop"
SIZES = {"hidden_size": 640, "intermediate_size": 1720, "num_hidden_layers": 12, "num_attention_heads": 10}


def model() -> torch.nn.Module:
    """With adapters that do something."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **SIZES))
    settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(base, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted.eval()


def variants(num_samples: int, prompt: int, new: int) -> dict[str, Callable[[], object]]:
    plain = model()
    bayesian = bayeformers.to_bayesian(model(), delta=0.2, target_modules=r".*\.lora_[AB]\..*").eval()
    posterior = bayeformers.VariationalPosterior(bayesian)
    inputs = {"input_ids": torch.randint(3, 32_000, (1, prompt))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def fixed() -> object:
        with bayeformers.fixed_draw(bayesian, 0):
            return bayesian.generate(**inputs, **options)

    def loop() -> None:
        for index in range(num_samples):
            with posterior.draw(index):
                bayesian.generate(**inputs, **options)

    def ours(mixing: str) -> Callable[[], object]:
        return lambda: bayeformers.generate(posterior, inputs, num_samples=num_samples, mixing=mixing, **options)

    return {
        PLAIN: lambda: plain.generate(**inputs, **options),
        "fixed_draw": fixed,
        'mixing="draws"': ours("draws"),
        'mixing="average"': ours("average"),
        LOOP: loop,
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], repeats=5)
    parser.add_argument("--num_samples", type=int, default=8, help="S, the draws")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=24, help="tokens that are generated")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    args = parser.parse_args()
    runs = variants(args.num_samples, args.prompt, args.new)
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        times = interleaved(runs, args.repeats, warmup=1)
        for name, values in times.items():
            row = {"generation": name, "threads": threads, "median seconds": statistics.median(values)}
            rows.append(
                row | {"/ plain": median_ratio(values, times[PLAIN]), "/ loop": median_ratio(values, times[LOOP])}
            )
    settings = {"repeats": args.repeats, "num_samples": args.num_samples, "prompt": args.prompt, "new": args.new}
    report(f"S = {args.num_samples} draws, batch 1, {args.new} tokens", rows, args.json, **settings)


if __name__ == "__main__":
    main()
