r"""How uncertain a prediction is, and why: entropies of draws, in nats.

Notation: p_s = p(y | x, w_s) for draws w_1 .. w_S of the weights, p = mean_s p_s. NumPy arrays are computed in
float64; torch tensors (any array-API array) keep their device, dtype and gradient, half precision being computed in
float32. Except where noted, every function takes

    log_probs   (S draws, ..., C classes), normalised over C; -inf is a probability of 0

and returns one value per example, (...). Usually that is (S, N, C) -> (N,); tokens (S, B, T, C) -> (B, T) work alike.
"""

from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, cast

import numpy as np
from array_api_compat import array_namespace, device, is_array_api_obj, is_numpy_array
from numpy.typing import NDArray

from ._checks import SUM_TOLERANCE, choice

if TYPE_CHECKING:
    from torch import Tensor

ArrayT = TypeVar("ArrayT", NDArray[Any], "Tensor")

Normalization = Literal["softmax", "softplus"]
NORMALIZATIONS = ("softmax", "softplus")


class CovarianceUncertainty(NamedTuple, Generic[ArrayT]):
    """The two terms of Cov[one-hot y] = diag(p) - p p^T, each (..., C, C) and positive semi-definite."""

    epistemic: ArrayT
    aleatoric: ArrayT


def predictive_entropy(log_probs: ArrayT) -> ArrayT:
    r"""Return the total uncertainty H[p] = -sum_c p_c log p_c of the averaged prediction, in [0, log C] nats.

    >>> draws = np.log([[[0.9, 0.1]], [[0.1, 0.9]]])  # two confident draws that disagree
    >>> predictive_entropy(draws).round(4)
    array([0.6931])
    """
    checked, xp = _log_probs(log_probs)
    return _like(_entropy(_mean_probs(checked, xp), xp), log_probs, xp)


def expected_entropy(log_probs: ArrayT) -> ArrayT:
    r"""Return the aleatoric part, mean_s H[p_s]: what remains uncertain when the weights are known, in [0, log C] nats.

    >>> draws = np.log([[[0.9, 0.1]], [[0.1, 0.9]]])
    >>> expected_entropy(draws).round(4)
    array([0.3251])
    """
    checked, xp = _log_probs(log_probs)
    return _like(_expected_entropy(checked, xp), log_probs, xp)


def mutual_information(log_probs: ArrayT) -> ArrayT:
    r"""Return the epistemic part of the predictive entropy, in nats: H[mean_s p_s] - mean_s H[p_s] >= 0.

    Zero iff the draws agree; rounding below zero is clamped. At most min(log S, log C). Houlsby et al. 2011,
    arXiv 1112.5745.

    >>> draws = np.log([[[0.9, 0.1]], [[0.1, 0.9]]])
    >>> mutual_information(draws).round(4)
    array([0.3681])
    """
    checked, xp = _log_probs(log_probs)
    difference = _entropy(_mean_probs(checked, xp), xp) - _expected_entropy(checked, xp)
    return _like(xp.where(difference > 0, difference, xp.zeros_like(difference)), log_probs, xp)


def expected_pairwise_kl(log_probs: ArrayT) -> ArrayT:
    r"""Return the mean over all S^2 pairs of draws of KL(p_s || p_t), in nats; >= `mutual_information`.

    Computed as -sum_c p_c mean_s log p_{s,c} - mean_s H[p_s]; infinite where one draw excludes a class that another
    allows. Malinin & Gales 2021, arXiv 2002.07650.

    >>> draws = np.log([[[0.9, 0.1]], [[0.1, 0.9]]])
    >>> expected_pairwise_kl(draws).round(4)
    array([0.8789])
    """
    checked, xp = _log_probs(log_probs)
    mean = _mean_probs(checked, xp)
    # Where p_c = 0 every draw has log p = -inf: masked before the product, as 0 * inf is NaN, also in the gradient.
    masked = xp.where(mean > 0, checked, xp.zeros_like(checked))
    cross_entropy = -xp.sum(mean * xp.mean(masked, axis=0), axis=-1)
    difference = cross_entropy - _expected_entropy(checked, xp)
    return _like(xp.where(difference > 0, difference, xp.zeros_like(difference)), log_probs, xp)


def variation_ratio(log_probs: ArrayT) -> ArrayT:
    r"""Return the share of draws whose argmax is not that of their mean, in [0, 1]. Ties go to the lower class index.

    >>> draws = np.log([[[0.9, 0.1]], [[0.6, 0.4]], [[0.2, 0.8]], [[0.7, 0.3]]])
    >>> variation_ratio(draws)
    array([0.25])
    """
    checked, xp = _log_probs(log_probs)
    mean = _mean_probs(checked, xp)
    # the order of the draws must not decide a tie: a sum of S numbers in [0, 1] is off by at most S eps / 2
    rounding = checked.shape[0] * float(xp.finfo(checked.dtype).eps)
    is_largest = mean >= xp.max(mean, axis=-1, keepdims=True) - rounding
    decision = xp.argmax(xp.astype(is_largest, checked.dtype), axis=-1)
    differs = xp.argmax(checked, axis=-1) != decision
    return _like(xp.mean(xp.astype(differs, checked.dtype), axis=0), log_probs, xp)


def covariance_uncertainty(logits: ArrayT, normalization: Normalization = "softmax") -> CovarianceUncertainty[ArrayT]:
    r"""Return the covariance form: epistemic mean_s (p_s - p)(p_s - p)^T, aleatoric diag(p) - mean_s p_s p_s^T.

    Shape: ``logits`` (S, ..., C) -> two of (..., C, C); they sum to diag(p) - p p^T. ``normalization`` makes
    probabilities of logits: "softmax" (Kwon et al. 2018) or "softplus", softplus(z) / sum_c softplus(z) (Shridhar et
    al. 2018, arXiv 1806.05978).

    Raises:
        ValueError: a logit is not finite.

    >>> parts = covariance_uncertainty(np.zeros((3, 1, 2)))  # draws that agree on (1/2, 1/2)
    >>> parts.epistemic.tolist(), parts.aleatoric.tolist()
    ([[[0.0, 0.0], [0.0, 0.0]]], [[[0.25, -0.25], [-0.25, 0.25]]])
    """
    choice(normalization, NORMALIZATIONS, "normalization")
    checked, xp = _working_array(logits, "logits")
    if not bool(xp.all(xp.isfinite(checked))):
        raise ValueError("`logits` must be finite, got NaN or infinite values.")
    probs = _normalise(checked, normalization, xp)
    mean = xp.mean(probs, axis=0)
    centred = probs - mean
    epistemic, second_moment = _second_moment(centred, xp), _second_moment(probs, xp)
    diagonal = mean[..., :, None] * xp.eye(mean.shape[-1], dtype=mean.dtype, device=device(mean))
    return CovarianceUncertainty(_like(epistemic, logits, xp), _like(diagonal - second_moment, logits, xp))


def bernoulli_log_probs(logits: ArrayT) -> ArrayT:
    r"""Return multi-label logits (S, ..., L) as L Bernoullis, (S, ..., L, 2): log sigmoid(-z), log sigmoid(z).

    Every function of this module then gives its per-label value, (..., L).

    Raises:
        ValueError: a logit is NaN.

    >>> predictive_entropy(bernoulli_log_probs(np.zeros((4, 1, 3)))).round(4)  # 4 draws, 1 example, 3 labels
    array([[0.6931, 0.6931, 0.6931]])
    """
    checked, xp = _working_array(logits, "logits")
    if bool(xp.any(xp.isnan(checked))):
        raise ValueError("`logits` must not be NaN.")
    return _like(xp.stack([-_softplus(checked, xp), -_softplus(-checked, xp)], axis=-1), logits, xp)


def _working_array(array: Any, name: str) -> tuple[Any, Any]:
    """The array in its working precision (float64 for NumPy, at least float32 otherwise) and its namespace."""
    if not is_array_api_obj(array) or is_numpy_array(array):
        array = np.asarray(array)
        array = array.astype(np.float64) if array.dtype.kind in "fiu" else array
    xp = array_namespace(array)
    if not xp.isdtype(array.dtype, "real floating"):
        raise TypeError(f"`{name}` must hold floating-point numbers, got dtype {array.dtype}.")
    if array.ndim < 3:
        raise ValueError(f"`{name}` must have shape (S draws, N, C), got {tuple(array.shape)}.")
    if 0 in tuple(array.shape):
        raise ValueError(f"`{name}` is empty, got shape {tuple(array.shape)}.")
    half = xp.finfo(array.dtype).bits < 32
    return (xp.astype(array, xp.float32) if half else array), xp


def _log_probs(log_probs: Any) -> tuple[Any, Any]:
    """`log_probs` checked: not NaN, no positive entry, normalised over classes up to the precision of its dtype."""
    checked, xp = _working_array(log_probs, "log_probs")
    if bool(xp.any(xp.isnan(checked))):
        raise ValueError("`log_probs` must not be NaN.")
    tolerance = max(SUM_TOLERANCE, 8 * _input_eps(log_probs, xp))
    error = xp.max(xp.abs(xp.sum(xp.exp(checked), axis=-1) - 1))
    if not bool(error <= tolerance):
        raise ValueError(
            f"`log_probs` must be normalised: exp summed over the last axis is off 1 by {float(error):.3g}, more than "
            f"{tolerance:.3g}. Probabilities need a log first, logits a log_softmax."
        )
    return checked, xp


def _mean_probs(log_probs: Any, xp: Any) -> Any:
    return xp.mean(xp.exp(log_probs), axis=0)


def _entropy(probs: Any, xp: Any) -> Any:
    """-sum p log p with 0 log 0 = 0; the inner `where` keeps log(0) out of the gradient too."""
    log_probs = xp.log(xp.where(probs > 0, probs, xp.ones_like(probs)))
    return 0.0 - xp.sum(probs * log_probs, axis=-1)  # 0 - x: certainty has entropy 0, not -0


def _expected_entropy(log_probs: Any, xp: Any) -> Any:
    probs = xp.exp(log_probs)
    finite = xp.where(probs > 0, log_probs, xp.zeros_like(log_probs))
    return 0.0 - xp.mean(xp.sum(probs * finite, axis=-1), axis=0)


def _second_moment(values: Any, xp: Any) -> Any:
    """mean_s v_s v_s^T, (S, ..., C) -> (..., C, C): no outer product per draw."""
    rows = xp.moveaxis(values, 0, -2)
    return xp.matmul(xp.matrix_transpose(rows), rows) / values.shape[0]


def _normalise(logits: Any, normalization: Normalization, xp: Any) -> Any:
    if normalization == "softplus":
        values = _softplus(logits, xp)
    else:
        values = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return values / xp.sum(values, axis=-1, keepdims=True)


def _softplus(x: Any, xp: Any) -> Any:
    """log(1 + exp(x)) without overflow, as logaddexp(x, 0)."""
    return xp.logaddexp(x, xp.zeros_like(x))


def _input_eps(array: Any, xp: Any) -> float:
    """Relative precision of the caller's dtype: 8e-3 for bfloat16, 1e-3 for float16."""
    dtype = array.dtype if is_array_api_obj(array) else np.asarray(array).dtype
    return float(xp.finfo(dtype).eps) if xp.isdtype(dtype, "real floating") else 0.0


def _like(result: Any, array: ArrayT, xp: Any) -> ArrayT:
    """The result in the dtype that the caller's array had; NumPy stays float64."""
    if is_array_api_obj(array) and not is_numpy_array(array):
        result = xp.astype(result, array.dtype)
    return cast(ArrayT, result)
