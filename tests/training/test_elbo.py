"""The ELBO's scale: N, groups, warm-up; and generators that stay as they were."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, default_collate
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from bayeformers.training.elbo import (
    Group,
    count_training_items,
    elbo_loss,
    infer_num_items,
    kl_warmup,
    preserved_rng,
)
from tests.training import tiny


class Stream(IterableDataset):
    """No length."""

    def __iter__(self):
        yield from iter(tiny.dataset("single", 8))


def test_micro_batches_add_up_to_the_mean_plus_one_kl() -> None:
    nlls, kl = torch.tensor([3.0, 5.0, 1.0]), torch.tensor(40.0)
    group = Group(torch.tensor(6), num_batches=3)
    parts = [elbo_loss(nll, group, kl / 100) for nll in nlls]
    total = sum(nll + term for nll, term in parts)
    torch.testing.assert_close(total, nlls.sum() / 6 + kl / 100)


def test_mean_over_ranks_is_the_mean_of_all_items() -> None:
    """DistributedDataParallel averages: two ranks with 1 and 2 micro-batches, 5 items in all."""
    ranks = [[torch.tensor(3.0)], [torch.tensor(2.0), torch.tensor(4.0)]]
    losses = []
    for nlls in ranks:
        group = Group(torch.tensor(5), num_batches=len(nlls), world_size=2)
        losses.append(sum(sum(elbo_loss(nll, group, torch.tensor(0.25))) for nll in nlls))
    torch.testing.assert_close(sum(losses) / 2, torch.tensor(9 / 5 + 0.25))


def test_a_group_without_labels_has_no_nll() -> None:
    assert elbo_loss(torch.tensor(0.0), Group(torch.tensor(0), 1))[0] == 0


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)])
def test_warmup_is_linear(step: int, expected: float) -> None:
    assert kl_warmup(step, max_steps=10, ratio=0.4) == expected


def test_no_warmup_by_default() -> None:
    assert kl_warmup(0, max_steps=10, ratio=0.0) == 1.0


def test_examples_are_counted_by_length() -> None:
    for kind, problem in (("regression", "regression"), ("multi", "multi_label_classification")):
        data = tiny.dataset(kind, 11)
        assert infer_num_items(data, problem, count=lambda: pytest.fail("not needed")) == 11


@pytest.mark.parametrize(("problem", "expected"), [("causal_lm", slice(1, None)), ("seq2seq_lm", slice(None))])
def test_tokens_are_counted_over_the_collated_data(problem: str, expected: slice) -> None:
    data = tiny.dataset("causal", 11)
    shares = [
        count_training_items(data, default_collate, problem, batch_size=2, rank=rank, world_size=2) for rank in range(2)
    ]
    assert sum(shares) == int((data.columns["labels"][:, expected] != -100).sum())
    assert infer_num_items(data, problem, count=lambda: sum(shares)) == sum(shares)


def test_random_masks_are_counted_to_their_expectation() -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {"[PAD]": 0, "[MASK]": 1, **{f"w{i}": i for i in range(2, tiny.VOCABULARY)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", mask_token="[MASK]")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    data = tiny.Rows(input_ids=torch.full((300, 6), 5))
    before = torch.get_rng_state()
    counted = count_training_items(data, collate, "token_classification", batch_size=50)
    assert torch.equal(before, torch.get_rng_state())
    expected = 0.3 * 1800
    assert abs(counted - expected) < 4 * (1800 * 0.3 * 0.7) ** 0.5  # 4 standard deviations of a binomial


def test_stream_of_known_length_is_counted_by_example_only() -> None:
    class Sized(Stream):
        def __len__(self) -> int:
            return 8

    assert infer_num_items(Sized(), "regression", count=lambda: 0) == 8
    with pytest.raises(ValueError, match="`num_training_items` must be given"):
        infer_num_items(Sized(), "causal_lm", count=lambda: 0)


def test_given_number_wins() -> None:
    assert infer_num_items(Stream(), "causal_lm", count=lambda: 0, given=123) == 123


@pytest.mark.parametrize(
    ("data", "problem", "message"),
    [
        (None, "regression", "`num_training_items` must be given where there is no `train_dataset`"),
        (Stream(), "regression", "`num_training_items` must be given: `train_dataset` is an IterableDataset"),
        ([], "regression", "`train_dataset` is empty"),
        ([1], "causal_lm", "`train_dataset` has no label"),
    ],
)
def test_n_that_cannot_be_known(data: object, problem: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_num_items(data, problem, count=lambda: 0)


def test_generators_are_left_alone() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with contextlib.suppress(RuntimeError), preserved_rng():
        random.random(), np.random.rand(), torch.rand(1)
        raise RuntimeError
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
