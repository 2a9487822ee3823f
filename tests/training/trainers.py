"""What the tests of other libraries' trainers share: a tokenizer and models of a few weights, and recorded steps."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

from bayeformers import fixed_draw, kl_divergence
from tests.training.steps import DRAW, Gradients, relative_error

WORDS = 24


class Fed:
    """Before a trainer: keeps every optimizer step's batches."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.__dict__.setdefault("fed", []).append([dict(batch) for batch in batches])
        return batches, count


def tokenizer(**kwargs: Any) -> hf.PreTrainedTokenizerFast:
    """One token per word "w0" ... "w20"; <pad> is 0 and <eos> is 1."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS - 3))])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", **kwargs
    )


def llama(kind: type = hf.LlamaForCausalLM, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A decoder of one layer, the same at every call."""
    config = hf.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=1,
        bos_token_id=1, **kwargs,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def arguments(kind: type, folder: Path | str, **kwargs: Any) -> Any:
    """Silent CPU arguments in float32: every step is logged, nothing is shuffled or clipped."""
    given = {
        "num_train_epochs": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "logging_steps": 1,
        "num_eval_samples": 3, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "bf16": False, "learning_rate": 1e-2, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return kind(str(folder), **{**given, **kwargs})


def check_gradients(trainer: Any, summed: Any, num_items: int, hold: bool = True) -> None:
    """Train, and compare every step's gradient with that of sum of ``summed`` / items + KL / ``num_items``.

    ``summed``: from a model and one micro-batch to (summed loss, number of items), without the trainer.
    """
    own, record = copy.deepcopy(trainer.model), Gradients()
    own.__dict__.pop("forward", None)  # trl's fused head, which calls the original
    for module in own.modules():
        module.__dict__.pop("forward", None)
    trainer.add_callback(record)
    with fixed_draw(trainer.model, DRAW):
        trainer.train()
    assert len(record.steps) == len(trainer.fed) > 1
    for step, batches in zip(record.steps, trainer.fed, strict=True):
        own.load_state_dict(step["state"], strict=False)
        own.zero_grad()
        with fixed_draw(own.train(), DRAW):
            found = [summed(own, batch) for batch in batches]
        total, count = sum(loss for loss, _ in found), sum(number for _, number in found)
        (total / count + kl_divergence(own) / num_items).backward()
        expected = {name: p.grad for name, p in own.named_parameters() if p.grad is not None and name in step["grads"]}
        assert relative_error(step["grads"], expected) < 1e-5


def token_nll(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(summed, number) over the predicted labels; a packed row's sequences are run one by one."""
    if "attention_mask" in batch:
        rows = [(batch["input_ids"][i, mask.bool()], batch["labels"][i, mask.bool()])
                for i, mask in enumerate(batch["attention_mask"])]  # fmt: skip
    else:
        bounds = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        rows = [(batch["input_ids"][0, a:b], batch["labels"][0, a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    total, count = torch.zeros(()), 0
    for ids, labels in rows:
        logits = model(input_ids=ids[None]).logits[0, :-1]
        kept = labels[1:] != -100
        total = total + F.cross_entropy(logits[kept], labels[1:][kept], reduction="sum")
        count += int(kept.sum())
    return total, count


def answer_log_prob(model: nn.Module, ids: Tensor, mask: Tensor, completion: Tensor) -> Tensor:
    """log p(completion | prompt) of every row, from the whole logits."""
    log_probs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    taken = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (taken * completion[:, 1:]).sum(1)
