"""`Predictive`: what S draws say about a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..likelihoods import (
    HEAD,
    IGNORED,
    Likelihood,
    NoiseStd,
    ProblemType,
    check_noise_std,
    gaussian_log_prob,
    get_likelihood,
    resized,
)
from ..likelihoods.classes import check_classes
from ..metrics import uncertainty

__all__ = ["Predictive"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictive:
    r"""A Bayesian prediction, with p_s = p(y | x, w_s) of the draws w_1 .. w_S and p = mean_s p_s.

    A linearised predictive's draws are of its logits, f_s ~ N(logit_mean, logit_covariance): its p is the closed form
    ``link_log_probs`` where there is one, and a regression's mean, variance and density are those of the Gaussian. All
    else, the three entropies included, is of the draws.

    Entropies are in nats. Probabilities are averaged, never logits. The draw axis is first, the class axis last; what
    stands between is the *example's* shape: (B,), per label (B, L) of a multi-label head (where C = 2: absent,
    present), per token (B, T), per pixel (B, H, W), or (B, 2) for the start and end of an answer (where C = T).

    Attributes:
        problem_type: what the head predicts, in transformers' words.
        log_probs: log p_s, (S, B, ..., C); None for a regression.
        values: a regression's outputs f_s, (S, B) or (S, B, L); None otherwise.
        noise_std: standard deviation of a regression's Gaussian noise; "head" if the model predicts it; None if it is
            not known.
        noise_variance: sigma_s^2 that a variance head predicts, (S, B) or (S, B, L) as ``values``; of a linearised
            predictive (1, B) or (1, B, L), the head's at the mean weights; None otherwise.
        mask: which tokens count, (B, T) bool; None: all.
        logit_mean: (B, C) or, per token, (B, T, C), of linearised predictives; (B, L) of L labels or outputs.
        logit_covariance: (B, C, C) or (B, T, C, C), of linearised predictives.
        link_log_probs: log p of a linearised predictive in closed form, (B, ..., C); None: the draws' average.
        ignored_label: of labels that do not count, besides -100: 255 of pixels.
        log_normalizers: logsumexp_c f_sc of draws of a softmax's logits, (S, B, ...): with ``log_probs`` they are the
            logits, and of a head over a vocabulary no second tensor of its size; None where they are not known.

    >>> draws = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])  # one example; two confident draws that disagree
    >>> predictive = Predictive(problem_type="single_label_classification", log_probs=draws.log())
    >>> predictive.mean_log_probs.exp()
    tensor([[0.5000, 0.5000]])
    >>> predictive.predictive_entropy, predictive.expected_entropy, predictive.mutual_information
    (tensor([0.6931]), tensor([0.3251]), tensor([0.3681]))
    """

    problem_type: ProblemType
    log_probs: Tensor | None = None
    values: Tensor | None = None
    noise_std: NoiseStd | None = None
    noise_variance: Tensor | None = None
    mask: Tensor | None = None
    logit_mean: Tensor | None = None
    logit_covariance: Tensor | None = None
    link_log_probs: Tensor | None = None
    ignored_label: int = IGNORED
    log_normalizers: Tensor | None = None

    def __post_init__(self) -> None:
        has_values = self._likelihood.has_noise
        if (self.values is None) == has_values or (self.log_probs is None) != has_values:
            raise ValueError(f"`values` are a regression's, `log_probs` all others', got {self.problem_type!r}.")
        check_noise_std(self.noise_std)
        self._check_noise_variance()
        if (self.logit_mean is None) != (self.logit_covariance is None):
            raise ValueError("`logit_mean` and `logit_covariance` go together: give both or none.")
        self._check_log_normalizers()
        if self.link_log_probs is None:
            return
        if self.log_probs is None:
            raise ValueError("`link_log_probs` must be None for a regression, whose density is its Gaussian's.")
        if self.link_log_probs.shape != self.log_probs.shape[1:]:
            expected, got = tuple(self.log_probs.shape[1:]), tuple(self.link_log_probs.shape)
            raise ValueError(f"`link_log_probs` must have shape {expected}, as one draw of `log_probs`, got {got}.")

    def _check_log_normalizers(self) -> None:
        if self.log_normalizers is None:
            return
        expected = None if self.log_probs is None else tuple(self.log_probs.shape[:-1])
        if tuple(self.log_normalizers.shape) != expected:
            raise ValueError(
                f"`log_normalizers` must have the shape {expected} of `log_probs` without its classes, got "
                f"{tuple(self.log_normalizers.shape)}."
            )

    def _check_noise_variance(self) -> None:
        if (self.noise_variance is None) == (self.noise_std == HEAD):
            raise ValueError(f'`noise_variance` goes with `noise_std`="head", got {self.noise_std!r}.')
        if self.noise_variance is None:
            return
        expected = self._values.shape if self.logit_mean is None else (1, *self._values.shape[1:])
        if self.noise_variance.shape != expected:
            raise ValueError(
                f"`noise_variance` must have shape {tuple(expected)}, got {tuple(self.noise_variance.shape)}."
            )

    @property
    def num_samples(self) -> int:
        """S."""
        return self._draws.shape[0]

    # -- classes ----------------------------------------------------------------------------------------------------

    @property
    def mean_log_probs(self) -> Tensor:
        """The average log p = logsumexp_s log p_s - log S, or the link's, (B, ..., C)."""
        if self.link_log_probs is not None:
            return self.link_log_probs
        return self._classes.logsumexp(dim=0) - math.log(self.num_samples)

    @property
    def probs(self) -> Tensor:
        """p, (B, ..., C)."""
        return self.mean_log_probs.exp()

    @property
    def predictive_entropy(self) -> Tensor:
        """Total uncertainty H[mean_s p_s], (B, ...)."""
        return uncertainty.predictive_entropy(self._classes)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric part mean_s H[p_s], (B, ...)."""
        return uncertainty.expected_entropy(self._classes)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part H[mean_s p_s] - mean_s H[p_s] >= 0, (B, ...)."""
        return uncertainty.mutual_information(self._classes)

    @property
    def expected_pairwise_kl(self) -> Tensor:
        """Mean over pairs of draws of KL(p_s || p_t), (B, ...)."""
        return uncertainty.expected_pairwise_kl(self._classes)

    @property
    def variation_ratio(self) -> Tensor:
        """Share of draws whose argmax is not that of mean_s p_s, (B, ...)."""
        return uncertainty.variation_ratio(self._classes)

    # -- logits -----------------------------------------------------------------------------------------------------

    @property
    def logits(self) -> Tensor:
        """The unnormalised logits f_s of each draw, (S, B, ..., C), of a multi-label head (S, B, L).

        They are made anew at each call.

        Raises:
            ValueError: they are not kept: a linearised predictive has ``logit_mean``, positions and ordinal heads none.
        """
        if self._likelihood.is_bernoulli:
            return self._classes[..., 1] - self._classes[..., 0]
        if self.log_normalizers is None:
            raise ValueError(
                f"This {self.problem_type!r} predictive has no `logits`: a linearised one has `logit_mean`, and the "
                "heads of a softmax keep them where `method`='sample'."
            )
        return self._classes + self.log_normalizers[..., None]

    @property
    def mean_logits(self) -> Tensor:
        """mean_s f_s, or ``logit_mean`` of a linearised predictive: (B, ..., C), of a multi-label head (B, L)."""
        if self.logit_mean is not None:
            return self.logit_mean
        return self.logits.mean(dim=0)

    @property
    def energy(self) -> Tensor:
        """Minus logsumexp_c of the mean logits, higher for the unfamiliar, (B, ...) (Liu et al. 2020, eq. 4, T = 1).

        Of a multi-label head minus sum_l log(1 + exp f_l), (B,) (Wang et al. 2021, eq. 7).
        """
        if self._likelihood.is_bernoulli:
            return -torch.nn.functional.softplus(self.mean_logits).sum(-1)
        self._check_softmax()
        return -self.mean_logits.logsumexp(-1)

    @property
    def max_logit(self) -> Tensor:
        """Minus the largest mean logit, higher for the unfamiliar, (B, ...) (Hendrycks et al. 2022)."""
        self._check_softmax()
        return -self.mean_logits.amax(-1)

    @property
    def logit_variance(self) -> Tensor:
        """The posterior's variance of the centred logits, mean_c Var(f_c - mean_c' f_c'), (B, ...).

        A softmax depends on nothing else; the variance that all logits share is left out. Of a multi-label head, or a
        regression, the variance of each output itself, averaged. Of draws Var is mean_s (f_s - mean)^2.
        """
        if self._likelihood.has_noise:
            return self.epistemic_variance.flatten(1).mean(-1) if self._values.dim() > 2 else self.epistemic_variance
        if self.logit_covariance is None:
            draws = self.logits if self._likelihood.is_bernoulli else self._classes
            centred = draws if self._likelihood.is_bernoulli else draws - draws.mean(-1, keepdim=True)
            return centred.var(dim=0, correction=0).mean(-1)
        variance = self.logit_covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        return variance if self._likelihood.is_bernoulli else variance - self.logit_covariance.mean((-2, -1))

    def _check_softmax(self) -> None:
        if self._likelihood.has_noise:
            raise ValueError("A regression has no logits of classes: see `epistemic_variance`.")

    # -- regression -------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """mean_s f_s, or the Gaussian's: (B,), of several outputs (B, L)."""
        return self._values.mean(dim=0) if self.logit_mean is None else self.logit_mean.reshape(self._values.shape[1:])

    @property
    def epistemic_variance(self) -> Tensor:
        """Var_s f_s = mean_s (f_s - mean)^2, or the Gaussian's: (B,), of several outputs (B, L)."""
        if self.logit_covariance is None:
            return self._values.var(dim=0, correction=0)
        variance = self.logit_covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        return variance.reshape(self._values.shape[1:])

    @property
    def aleatoric_variance(self) -> Tensor:
        """noise_std^2, or mean_s sigma_s^2 of a variance head: (B,), (B, L); ValueError where it is not known."""
        return self._noise_variance.mean(dim=0).expand(self._values.shape[1:])

    # -- pixels -----------------------------------------------------------------------------------------------------

    def resized(self, size: tuple[int, int]) -> Predictive:
        """Interpolate every draw's logits bilinearly, as the models' own losses do.

        Returns:
            The predictive of a segmentation at another resolution (H', W'), such as the image's.

        Raises:
            ValueError: a predictive of another kind.
        """
        if not self._likelihood.is_per_pixel:
            raise ValueError(f"`resized` is for pixels, got a {self.problem_type!r} predictive.")
        log_probs = resized(self._classes, size)
        if self.log_normalizers is None or log_probs is self._classes:
            return replace(self, log_probs=log_probs)
        logits = self.logits.movedim(-1, -3)
        scaled = torch.nn.functional.interpolate(logits.flatten(0, -4), size=size, mode="bilinear")
        largest = scaled.reshape(*logits.shape[:-2], *size).amax(-3)
        return replace(self, log_probs=log_probs, log_normalizers=largest - log_probs.amax(-1))

    # -- both -------------------------------------------------------------------------------------------------------

    def log_prob(self, labels: Tensor) -> Tensor:
        """Score labels by log p(label), averaged over draws as a probability.

        Of a linearised predictive: the link's, or log N(label; mean, epistemic + aleatoric variance) per output.

        Args:
            labels: of the example's shape: class numbers, 0/1 per label, values of a regression, token numbers
                (position t of a causal language model is scored on label t + 1, the last one on none), classes of
                pixels (B, H', W') at any resolution, or start and end (B, 2), where a position beyond the sequence has
                no label.

        Returns:
            Nats, of the example's shape; NaN where a label is -100.

        Raises:
            TypeError: labels are no tensor.
            ValueError: labels of another shape, dtype or out of range; a regression whose noise is not known.
        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"`labels` must be a tensor, got {type(labels).__name__}.")
        likelihood, shape = self._likelihood, self._draws.shape[1:]
        if likelihood.is_per_pixel and labels.dim() == 3 and labels.shape != shape[:-1]:
            return self.resized((labels.shape[1], labels.shape[2])).log_prob(labels)
        shape = shape if likelihood.has_noise else shape[:-1]
        if labels.shape != shape:
            raise ValueError(f"`labels` must have shape {tuple(shape)}, got {tuple(labels.shape)}.")
        if likelihood.has_noise:
            return self._normal_log_prob(labels)
        labels = likelihood.class_numbers(labels)
        ignored = (labels == IGNORED) | (labels == self.ignored_label)
        ignored = ignored | likelihood.outside(labels, self._classes.shape[-1])
        check_classes(labels, self._classes.shape[1:], ~ignored)
        kept = labels.masked_fill(ignored, 0)
        return self.mean_log_probs.gather(-1, kept[..., None]).squeeze(-1).masked_fill(ignored, torch.nan)

    def _normal_log_prob(self, labels: Tensor) -> Tensor:
        if self.logit_mean is None:  # log mean_s N(label; f_s, sigma_s^2)
            log_density = gaussian_log_prob(labels.to(self._values), self._values, 0.5 * self._noise_variance.log())
            return log_density.logsumexp(dim=0) - math.log(self.num_samples)
        variance = self.epistemic_variance + self.aleatoric_variance
        return gaussian_log_prob(labels.to(variance), self.mean, 0.5 * variance.log())

    @property
    def _likelihood(self) -> Likelihood:
        return get_likelihood(self.problem_type)

    @property
    def _draws(self) -> Tensor:
        draws = self.values if self.log_probs is None else self.log_probs
        assert draws is not None  # __post_init__
        return draws

    @property
    def _classes(self) -> Tensor:
        if self.log_probs is None:
            raise ValueError("A regression has no class probabilities: see `mean`, `epistemic_variance`, `values`.")
        return self.log_probs

    @property
    def _values(self) -> Tensor:
        if self.values is None:
            raise ValueError(f"A {self.problem_type!r} predictive has no values: see `mean_log_probs`, `log_probs`.")
        return self.values

    @property
    def _noise_variance(self) -> Tensor:
        """Broadcasts against the values, draw axis first."""
        if self.noise_variance is not None:
            return self.noise_variance
        if self.noise_std is None or self.noise_std == HEAD:
            raise ValueError("`noise_std` is not known: pass it to `predict`, for example the RMSE on training data.")
        return self._values.new_full((1,) * self._values.dim(), self.noise_std**2)
