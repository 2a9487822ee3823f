"""AvUC and AUAvU against loops over items, in every corner, and in half precision."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeformers import metrics
from bayeformers.losses import auavu_loss, avuc_loss
from bayeformers.losses.alignment import alignment_sums
from bayeformers.losses.avu import confidence_and_uncertainty

EPS = 0.01
KINDS = ["predictive_entropy", "mutual_information"]


def entropy(p: Tensor) -> float:
    return -sum(float(x) * math.log(float(x)) for x in p if x > 0)


def described(logits: Tensor, labels: Tensor, kind: str) -> list[tuple[bool, float, float]]:
    """(right, c, u) of every labelled item, one at a time."""
    items = []
    for i, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        draws = [torch.softmax(z[i], -1) for z in logits]
        p = sum(draws) / len(draws)
        u = entropy(p)
        if kind == "mutual_information":
            u -= sum(entropy(draw) for draw in draws) / len(draws)
        items.append((int(p.argmax()) == label, float(p.max()), u))
    return items


def counts(items: list[tuple[bool, float, float]], threshold: float) -> tuple[float, float, float, float]:
    n_ac = n_au = n_ic = n_iu = 0.0
    for right, c, u in items:
        if right and u <= threshold:
            n_ac += c * (1 - math.tanh(u))
        elif right:
            n_au += c * math.tanh(u)
        elif u <= threshold:
            n_ic += (1 - c) * (1 - math.tanh(u))
        else:
            n_iu += (1 - c) * math.tanh(u)
    return n_ac, n_au, n_ic, n_iu


def avuc_by_loop(logits: Tensor, labels: Tensor, threshold: float, kind: str = KINDS[0]) -> float:
    n_ac, n_au, n_ic, n_iu = counts(described(logits, labels, kind), threshold)
    return math.log(1 + (n_au + n_ic + EPS) / (n_ac + n_iu + EPS))


def auavu_by_loop(logits: Tensor, labels: Tensor, kind: str = KINDS[0]) -> float:
    items = described(logits, labels, kind)
    low, high = min(u for *_, u in items), max(u for *_, u in items)
    values = []
    for j in range(21):
        n_ac, n_au, n_ic, n_iu = counts(items, high if j == 20 else low + j / 20 * (high - low))
        values.append((n_ac + n_iu + EPS) / (n_ac + n_au + n_ic + n_iu + 2 * EPS))
    return -math.log(float(np.trapezoid(values, dx=1 / 20)))


def random_case(seed: int, size: int, draws: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(draws, size, classes, dtype=torch.float64, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    labels[1::4] = -100
    return logits, labels


CASES = [(0, 1, 1, 2), (1, 2, 3, 3), (2, 7, 1, 5), (3, 40, 4, 3), (4, 200, 8, 2), (5, 64, 2, 30)]


@pytest.mark.protects("avuc_runs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_avuc_equals_a_loop(case: tuple[int, int, int, int], kind: Any) -> None:
    logits, labels = random_case(*case)
    for threshold in (0.0, 0.05, 0.3, 0.8, 5.0):
        loss = avuc_loss(logits, labels, threshold, uncertainty=kind)
        # a single draw's mutual information is 0 to rounding, on either side of a threshold of 0
        if case[2] > 1 or kind == KINDS[0] or threshold > 0:
            assert float(loss) == pytest.approx(avuc_by_loop(logits, labels, threshold, kind), rel=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_auavu_equals_a_loop(case: tuple[int, int, int, int]) -> None:
    logits, labels = random_case(*case)
    assert float(auavu_loss(logits, labels)) == pytest.approx(auavu_by_loop(logits, labels), rel=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case[2] > 1])
def test_auavu_of_mutual_information_equals_a_loop(case: tuple[int, int, int, int]) -> None:
    logits, labels = random_case(*case)
    loss = auavu_loss(logits, labels, uncertainty="mutual_information")
    assert float(loss) == pytest.approx(auavu_by_loop(logits, labels, "mutual_information"), rel=1e-8)


def test_probabilities_are_averaged_over_draws_not_logits() -> None:
    logits = torch.tensor([[[4.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]], dtype=torch.float64)
    labels = torch.tensor([0])
    assert float(avuc_loss(logits, labels, 0.9)) == pytest.approx(avuc_by_loop(logits, labels, 0.9))
    assert avuc_loss(logits, labels, 0.9) != avuc_loss(logits.mean(0), labels, 0.9)


def test_log_probabilities_are_logits_of_themselves() -> None:
    logits, labels = random_case(3, 40, 4, 3)
    torch.testing.assert_close(avuc_loss(logits.log_softmax(-1), labels, 0.5), avuc_loss(logits, labels, 0.5))


def test_tokens_flatten() -> None:
    logits, labels = random_case(3, 40, 4, 3)
    folded = avuc_loss(logits.reshape(4, 5, 8, 3), labels.reshape(5, 8), 0.5)
    torch.testing.assert_close(folded, avuc_loss(logits, labels, 0.5))


def test_equal_weights_give_the_metric_s_area() -> None:
    """With rightness and certainty 1/2 for all items the soft counts are the hard ones / 4: AUAvU is the metric's."""
    logits, labels = random_case(6, 100, 1, 2)
    is_right, _, spread = confidence_and_uncertainty(logits, labels)
    half = torch.full_like(spread, 0.5)
    limits = torch.lerp(spread.min(), spread.max(), torch.linspace(0, 1, 21, dtype=torch.float64))
    aligned, misaligned = alignment_sums(is_right, spread <= limits[:, None], half, half)
    values = (aligned / (aligned + misaligned)).numpy()
    hard = metrics.accuracy_vs_uncertainty(spread.numpy(), ~is_right.numpy())
    np.testing.assert_allclose(values, hard.values)
    assert np.trapezoid(values, dx=1 / 20) == pytest.approx(hard.area)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["avuc", "auavu"])
def test_gradcheck(loss: str, kind: Any) -> None:
    logits, labels = random_case(7, 9, 3, 4)

    def function(z: Tensor) -> Tensor:
        return (
            avuc_loss(z, labels, 0.4, uncertainty=kind) if loss == "avuc" else auavu_loss(z, labels, uncertainty=kind)
        )

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def corners() -> dict[str, tuple[Tensor, Tensor, float]]:
    sharp = torch.tensor([[50.0, 0.0, 0.0], [0.0, 50.0, 0.0]])
    return {
        "all right": (sharp, torch.tensor([0, 1]), 0.5),
        "all wrong": (sharp, torch.tensor([1, 2]), 0.5),
        "uniform": (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), 0.5),
        "all certain": (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), 2.0),
        "all uncertain": (sharp, torch.tensor([0, 2]), -1.0),
        "one-hot": (torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]), torch.tensor([0, 0]), 0.5),
        "one-hot in every draw": (torch.tensor([[[0.0, -torch.inf]], [[0.0, -torch.inf]]]), torch.tensor([1]), 0.5),
        "huge": (torch.tensor([[3e4, -3e4], [-3e4, 3e4]]), torch.tensor([0, 0]), 0.5),
        "one item": (torch.tensor([[1.0, 0.0]]), torch.tensor([1]), 0.5),
        "nothing labelled": (torch.zeros(2, 3), torch.tensor([-100, -100]), 0.5),
        "empty": (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 0.5),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(corners()))
def test_value_and_gradient_are_finite(name: str, kind: Any, dtype: torch.dtype) -> None:
    values, labels, threshold = corners()[name]
    for loss in (avuc_loss, auavu_loss):
        logits = values.clone().to(dtype).requires_grad_()
        arguments = (threshold,) if loss is avuc_loss else ()
        value = loss(logits, labels, *arguments, uncertainty=kind)
        value.backward()
        assert value.dim() == 0 and value.isfinite() and value >= 0
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert logits.grad is not None and logits.grad.isfinite().all()


def test_nothing_labelled_is_indifferent() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    value = avuc_loss(logits, torch.tensor([-100, -100]), 0.5)
    value.backward()
    assert float(value) == pytest.approx(math.log(2))
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_its_input(dtype: torch.dtype) -> None:
    """The logits' own rounding is the only loss of precision."""
    logits, labels = random_case(3, 40, 4, 3)
    rounded = logits.to(dtype)
    torch.testing.assert_close(avuc_loss(rounded, labels, 0.5), avuc_loss(rounded.float(), labels, 0.5))
    torch.testing.assert_close(auavu_loss(rounded, labels), auavu_loss(rounded.float(), labels))


GOOD = torch.zeros(2, 4, 3)
LABELS = torch.tensor([0, 1, 2, -100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [[0.0, 1.0]]}, "`logits` must be a tensor"),
        ({"logits": GOOD.long()}, "`logits` must be floating-point"),
        ({"logits": GOOD[:, :3]}, r"`logits` must have shape .*\(4,\), got \(2, 3, 3\)"),
        ({"logits": GOOD[:0]}, "`logits` need at least one draw"),
        ({"logits": GOOD[..., :1]}, "two classes"),
        ({"logits": GOOD * torch.nan}, "`logits` must not be NaN"),
        ({"labels": LABELS.float()}, "`labels` must be integer classes, got torch.float32"),
        ({"labels": LABELS + 1}, r"`labels` must lie in \[0, 3\).*got 3"),
        ({"labels": LABELS - 1}, r"`labels` must lie in \[0, 3\).*got -1"),
        ({"labels": [0, 1, 2, 0]}, "`labels` must be a tensor"),
        ({"threshold": math.nan}, "`threshold` must be finite"),
        ({"threshold": torch.ones(2)}, "`threshold` must be one number"),
        ({"threshold": "0.5"}, "`threshold` must be a number"),
        ({"uncertainty": "entropy"}, "`uncertainty` must be one of"),
        ({"eps": 0.0}, "`eps` must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"logits": GOOD, "labels": LABELS, "threshold": 0.5, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        avuc_loss(**arguments)


@pytest.mark.parametrize("count", [1, 0, 2.5, True])
def test_too_few_thresholds(count: Any) -> None:
    with pytest.raises(ValueError, match="`num_thresholds` must be a whole number >= 2"):
        auavu_loss(GOOD, LABELS, num_thresholds=count)
