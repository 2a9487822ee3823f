"""Making a draw, beside torch.randn of its weights, in processor seconds: python -m benchmarks.noise

One weight of 4096 x 1024 on one thread: the noise alone, with a scale that is at hand, and the whole draw from
rho; and one forward in a new draw of a language model beside one in a held draw, from a configuration of SmolLM2-135M's
sizes. No pretrained model is needed.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bayeformers import fixed_draw, posterior_mean, to_bayesian
from bayeformers.nn.noise import Draw, TensorSpec, noise_key
from bayeformers.nn.variational import Variational
from bayeformers.sampling import philox
from benchmarks.harness import arguments, interleaved, median_ratio, report

SHAPE, CPU = (4096, 1024), torch.device("cpu")


def draws() -> dict[str, Callable[[], object]]:
    """Ways to noise and to a draw of one weight."""
    generator = torch.Generator().manual_seed(0)
    loc, rho = torch.randn(SHAPE) * 0.05, torch.randn(SHAPE) * 0.3 - 5
    scale = torch.nn.functional.softplus(rho)

    def drawn(version: int) -> Tensor:
        return Variational(loc, rho, TensorSpec("weight", noise_version=version), Draw(0, 1)).sample()

    return {
        "torch.randn": lambda: torch.randn(SHAPE, generator=generator),
        "noise": lambda: philox.normal(noise_key(0, 1, "weight"), SHAPE, CPU),
        "noise * scale + mean": lambda: philox.normal(noise_key(0, 1, "weight"), SHAPE, CPU).mul_(scale).add_(loc),
        "draw from rho": lambda: drawn(3),
        "draw from rho, version 2": lambda: drawn(2),
    }


def forwards(tokens: int) -> dict[str, Callable[[], object]]:
    """A pass of the mean, and one in a draw that is new each time."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = to_bayesian(LlamaForCausalLM(config).eval())
    ids, count = torch.randint(0, 49152, (1, tokens)), iter(range(10**6))

    def mean() -> None:
        with posterior_mean(model):
            model(ids)

    def new_draw() -> None:
        with fixed_draw(model, next(count)):
            model(ids)

    return {"pass of the mean": mean, "first pass in a new draw": new_draw}


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__, 9)
    parser.add_argument("--tokens", type=int, default=264, help="of the language model's passes; 0 leaves them out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = [(draws(), "torch.randn")] + ([(forwards(args.tokens), "pass of the mean")] if args.tokens else [])
    rows: list[dict[str, str | float]] = []
    for runs, baseline in tables:
        times = interleaved(runs, args.repeats, clock=time.process_time)
        rows += [
            {
                "variant": name,
                "CPU seconds": statistics.median(found),
                "ratio": median_ratio(found, times[baseline]),
                "to": baseline,
            }
            for name, found in times.items()
        ]
    report("Draws of a weight, and passes in new draws", rows, args.json, tokens=args.tokens)


if __name__ == "__main__":
    main()
