"""`LaplacePosterior`: a Gaussian at the trained weights, N(theta*, (F / (T s^2) + tau)^-1), layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..likelihoods import ProblemType, get_likelihood, logits_of, resolve_problem_type
from ..likelihoods.registry import likelihood_of_family
from ..linearized.blocks import GaussianBlock, block_draw
from ..linearized.captured import OutputOf, Statistic
from ..posteriors.files import register_posterior
from ..processes.dtensors import is_split
from ..sampling.generators import NOISE_VERSION, check_noise_version
from ..storage import folder, read, saved_file, write
from .blocks import LaplaceBlock
from .config import CurvatureConfig, PriorChoice
from .curvature import Curvature
from .evidence import Precision, Spectrum, checked_precision, effective_parameters, log_marginal_likelihood
from .kronecker import KroneckerEigen
from .moved import MovedPosterior, by_parameter
from .saving import PARTS, check_parts, packed, recorded_layers, saved_targets, unpacked
from .targets import Fingerprint, Target

FILE = "laplace.safetensors"
DEFAULT_DRAW_CACHE_BYTES = 2 * 2**30


End = Literal["smallest", "largest"]
ChoiceMethod = Literal["given", PriorChoice]


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """How tau was found.

    Attributes:
        method: "given", held-out NLL ("holdout"), that of perturbed training rows ("perturbed"), the leverages of
            training rows ("leverage"), or the evidence ("marglik", "marglik_per_layer").
        at_grid_end: the end of the range that was searched where tau lies there (of any layer), else None: the true
            optimum lies beyond, or there is none.
        num_rows: training rows that "perturbed" or "leverage" looked at, of all processes; else None.
    """

    method: ChoiceMethod = "given"
    at_grid_end: End | None = None
    num_rows: int | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrecisionChoice:
        """Return what a file says.

        Raises:
            ValueError: it is no such choice.
        """
        methods, ends = get_args(ChoiceMethod), (None, *get_args(End))
        method, end, rows = data.get("method"), data.get("at_grid_end"), data.get("num_rows")
        if method not in methods or end not in ends or not isinstance(rows, int | None):
            raise ValueError(f"The file's choice of the prior precision must be one of {methods}, got {data!r}.")
        return cls(method=cast(ChoiceMethod, method), at_grid_end=end, num_rows=rows)


@dataclass(frozen=True, kw_only=True)
class FitRecord:
    """What a fit saw.

    Attributes:
        config: how the curvature was measured.
        num_data: N, the examples that the curvature stands for.
        log_likelihood: sum of log p(y | x, theta*) over them, at noise 1 of a regression; NaN without labels.
        squared_error: of a regression, summed over examples and outputs.
        num_outputs: N C: numbers that the examples' likelihood terms predict, of a regression those that were observed;
            0 where it is unknown.
        skipped: layer name -> why it stays deterministic.
        squared_distances: layer name -> |theta* - mu0|^2, where the prior's mean mu0 is not 0.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    config: CurvatureConfig
    num_data: int
    log_likelihood: float
    squared_error: float = 0.0
    num_outputs: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    squared_distances: Mapping[str, float] = field(default_factory=dict)
    noise_version: int = NOISE_VERSION

    @classmethod
    def from_sums(
        cls, sums: Curvature, skipped: Mapping[str, str], distances: Mapping[str, float] | None = None
    ) -> FitRecord:
        """Return what the sums say about the data.

        Args:
            sums: the sums of the whole fit, over all processes.
            skipped: layer name -> why it stays deterministic.
            distances: layer name -> |theta* - mu0|^2, where the prior's mean mu0 is not 0.
        """
        return cls(
            config=sums.config,
            num_data=round(sums.num_examples * sums.data_scale),
            log_likelihood=sums.log_likelihood * sums.data_scale,
            squared_error=sums.squared_error * sums.data_scale,
            num_outputs=round(sums.num_outputs * sums.data_scale),
            skipped=dict(skipped),
            squared_distances=dict(distances or {}),
        )


@register_posterior
class LaplacePosterior(MovedPosterior):
    """The result of `fit`: frozen, and independent of the data it was fitted to.

    The model's own weights are the posterior mean; a draw is copied into them and taken out again.

    Args:
        model: the trained model.
        layers: each layer with its eigendecomposed curvature.
        record: what the fit saw.
        prior_precision: tau of the prior N(0, I / tau): one, or one per layer name.
        temperature: T of the likelihood p(y | x)^(1/T).
        noise_std: s of a regression.
        outputs_of: the logits in what the model returns.
        draw_cache_bytes: memory in which draws are kept for the next batch.
        choice: how the prior precision was found.
    """

    default_method = "glm"
    file_name = FILE

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[Target, KroneckerEigen]],
        record: FitRecord,
        *,
        prior_precision: Precision = 1.0,
        temperature: float = 1.0,
        noise_std: float = 1.0,
        outputs_of: OutputOf = logits_of,
        draw_cache_bytes: int = DEFAULT_DRAW_CACHE_BYTES,
        choice: PrecisionChoice | None = None,
        fingerprints: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        names = [target.name for target, _ in layers]
        check_number("temperature", temperature, 0.0, strict=True)
        check_number("noise_std", noise_std, 0.0, strict=True)
        self.model, self.record, self.draw_cache_bytes = model, record, draw_cache_bytes
        self.prior_precision = checked_precision(prior_precision, names)
        self.temperature, self.noise_std = float(temperature), float(noise_std)
        self.likelihood_precision = 1 / (self.temperature * self.noise_std**2)
        self.choice = PrecisionChoice() if choice is None else choice
        self._layers, self._outputs_of = list(layers), outputs_of
        self.fingerprints = fingerprints or {target.name: target.fingerprint for target in self.targets}
        is_split_up = any(is_split(parameter) for parameter in self.random_parameters())
        # of a sharded model all processes have to ask for weights: once, at the fit
        self._norms = {t.name: t.squared_norm for t in self.targets} if is_split_up and not fingerprints else {}
        self._blocks = self.blocks_at([self.prior_precision])
        self._cache: dict[tuple[int, int], dict[nn.Parameter, Tensor]] = {}
        self._kept: tuple[str, Statistic] | None = None

    def __repr__(self) -> str:
        taus = self.prior_precision if isinstance(self.prior_precision, float) else [*self.prior_precision.values()]
        shown = f"{taus:.4g}" if isinstance(taus, float) else f"{min(taus):.4g}..{max(taus):.4g} per layer"
        return (
            f"LaplacePosterior({self.record.config.curvature}, {len(self._layers)} layers, "
            f"{sum(target.num_weights for target, _ in self._layers):,} weights, prior_precision={shown})"
        )

    # -- the Gaussian ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, KroneckerEigen]:
        """Layer name -> its eigendecomposed curvature."""
        return {target.name: eigen for target, eigen in self._layers}

    @property
    def targets(self) -> list[Target]:
        """The covered layers, in the model's order."""
        return [target for target, _ in self._layers]

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """Layer name -> eigenvalues, and squared distance from the prior's mean, of which the evidence is made."""
        distances = self.record.squared_distances
        known = {**self._norms, **distances}
        known |= {target.name: target.squared_norm for target, _ in self._layers if target.name not in known}
        return {target.name: Spectrum(eigen.eigenvalues, known[target.name]) for target, eigen in self._layers}

    @property
    def log_marginal_likelihood(self) -> float:
        """The evidence log p(D | tau) in nats (Immer et al. 2021); comparable between posteriors of one model.

        Raises:
            ValueError: the fit saw no labels.
        """
        log_likelihood = self._log_likelihood()
        if math.isnan(log_likelihood):
            raise ValueError("The fit's data had no labels: only differences between prior precisions are known.")
        spectra = self.spectra
        return log_marginal_likelihood(log_likelihood, spectra, self.prior_precision, scale=self.likelihood_precision)

    @property
    def effective_parameters(self) -> dict[str, float]:
        """Layer name -> sum L / (L + tau / scale): how many of its weights the data determine (MacKay 1992)."""
        return effective_parameters(self.spectra, self.prior_precision, scale=self.likelihood_precision)

    @property
    def exceeds_data(self) -> bool:
        """Whether there are more effective parameters than the data hold numbers, N C: more than they can determine.

        Kronecker factors then stand for more directions than the data have, so the division of the uncertainty into
        aleatoric and epistemic has no meaning.
        """
        return 0 < self.record.num_outputs < sum(self.effective_parameters.values())

    @property
    def caveats(self) -> list[str]:
        """Why this posterior's uncertainty should not be believed, a sentence each; none as a rule."""
        found = []
        if self.choice.at_grid_end is not None:
            found.append(f"tau lies at the {self.choice.at_grid_end} end of the range that was searched")
            if self.choice.method in ("leverage", "perturbed") and self.choice.at_grid_end == "largest":
                found.append("the posterior stays next to the trained network")
        if self.exceeds_data:
            gamma = sum(self.effective_parameters.values())
            found.append(
                f"{gamma:,.0f} effective parameters exceed the {self.record.num_outputs:,} numbers that the data hold"
            )
        return found

    def _log_likelihood(self) -> float:
        record = self.record
        if not likelihood_of_family(record.config.likelihood).has_noise:
            return record.log_likelihood / self.temperature
        constant = record.num_outputs * (math.log(self.noise_std) + 0.5 * math.log(2 * math.pi))
        missing = math.nan if record.num_outputs == 0 else 0.0
        return missing - (record.squared_error / (2 * self.noise_std**2) + constant) / self.temperature

    def with_prior_precision(
        self, prior_precision: Precision, choice: PrecisionChoice | None = None
    ) -> LaplacePosterior:
        """The same curvature under another prior, found as ``choice`` says; nothing is fitted again."""
        return self._replace(prior_precision=prior_precision, choice=choice)

    def with_temperature(self, temperature: float) -> LaplacePosterior:
        """The same curvature with the likelihood to the power 1/T; the prior is not tuned again."""
        return self._replace(temperature=temperature)

    def with_noise_std(self, noise_std: float) -> LaplacePosterior:
        """A regression's posterior for another noise."""
        return self._replace(noise_std=noise_std)

    def _replace(self, **changes: Any) -> LaplacePosterior:
        names = ("prior_precision", "temperature", "noise_std", "draw_cache_bytes", "choice", "fingerprints")
        kept = {name: getattr(self, name) for name in names}
        other = LaplacePosterior(
            self.model, self._layers, self.record, outputs_of=self._outputs_of, **{**kept, **changes}
        )
        other._norms = self._norms
        return other

    def blocks(self) -> Sequence[LaplaceBlock]:
        """One block per layer."""
        return self._blocks

    def blocks_at(self, prior_precisions: Sequence[Precision]) -> list[LaplaceBlock]:
        """Blocks of several posteriors at once, which differ in their prior: one pass predicts with all."""
        is_dense = self.record.config.curvature == "dense"
        return [
            LaplaceBlock(
                target,
                eigen,
                tuple(p if isinstance(p, float) else p[target.name] for p in prior_precisions),
                self.likelihood_precision,
                is_dense and eigen.eigenvalues.shape[1] == 1 and eigen.left is None and eigen.right is not None,
                self.record.noise_version,
            )
            for target, eigen in self._layers
        ]

    def _statistic(self, method: str, blocks: Sequence[GaussianBlock], **options: Any) -> Statistic:
        """The last one stays for the next batch: to choose directions, or to make draws, reads all weights."""
        key = repr((method, self.draw_cache_bytes, options))  # 1 is a rank and 1.0 a quantile, though they are equal
        kept = self._kept
        if kept is None or kept[0] != key:
            self._kept = kept = (key, super()._statistic(method, blocks, **options))
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the kept statistic, a function that cannot be pickled."""
        return {**vars(self), "_kept": None}

    def variances(self) -> dict[nn.Parameter, Tensor]:
        """Marginal variance of every covered Parameter."""
        found: dict[nn.Parameter, Tensor] = {}
        for (target, eigen), block in zip(self._layers, self._blocks, strict=True):
            values = eigen.marginal_variance(block.prior_precisions[0], self.likelihood_precision)
            found |= by_parameter(target, block.placed(values))
        return found

    # -- a posterior -------------------------------------------------------------------------------------------------

    def problem_type(self) -> ProblemType:
        """That of the model's class; for a class that transformers does not know, of the fit's likelihood."""
        known, family = get_likelihood(resolve_problem_type(self.model)), self.record.config.likelihood
        is_told = known.is_known and known.family == family  # a model may not know that it is multi-label
        return (known if is_told else likelihood_of_family(family)).problem_type

    def _deviation(self, index: int, seed: int) -> dict[nn.Parameter, Tensor]:
        """The first draws stay in memory: every batch asks for the same ones."""
        key = (index, seed)
        if key in self._cache:
            return self._cache[key]
        drawn: dict[nn.Parameter, Tensor] = {}
        for block in self._blocks:
            drawn |= by_parameter(block.target, block_draw(block, index, seed))
        size = sum(value.nbytes for value in drawn.values())
        if size * (len(self._cache) + 1) <= self.draw_cache_bytes:
            self._cache[key] = drawn
        return drawn

    # -- persistence -------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``laplace.safetensors``, beside the model's own files: eigenvectors, eigenvalues, what the fit knew.

        In the precision of the fit (float32 but for a float64 model), and nothing twice: layers that read one tensor
        share their basis, and the eigenvalues of "kfac" are products of two vectors. A reload has the same bits.
        Weights that have moved since the fit are refused with a ValueError.
        """
        layers = recorded_layers(self.targets, self.fingerprints)
        meta = {
            "record": asdict(self.record),
            "prior_precision": self.prior_precision,
            "temperature": self.temperature,
            "noise_std": self.noise_std,
            "choice": asdict(self.choice),
            "layers": layers,
        }
        write(folder(directory) / FILE, packed(self.layers), meta, kind="laplace")

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], model: nn.Module, *, outputs_of: OutputOf = logits_of
    ) -> LaplacePosterior:
        """Return the posterior that `save` wrote, around the model that it was fitted to.

        Args:
            directory: the folder of `save`, or the file itself.
            model: the model that the posterior was fitted to, with the same weights.
            outputs_of: from what the model returns to its logits; it is not saved.

        Raises:
            TypeError: ``model`` is not a module.
            ValueError: a file is missing, damaged or changed, or the model has other layers or weights.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        path = folder(directory)
        saved, meta = read(saved_file(directory, FILE), kind="laplace")
        tensors, factors = unpacked(saved)
        targets = saved_targets(model, meta["layers"])
        check_parts(tensors, targets, meta["record"]["config"]["curvature"], f"{str(path)!r}")
        layers = []
        for target in targets:
            parts = {name: tensors.get(f"{target.name}/{name}") for name in PARTS}
            like = next(iter(target.parameters.values()))
            placed = {
                name: None if value is None else value.to(like.device, torch.promote_types(value.dtype, like.dtype))
                for name, value in parts.items()
            }
            layers.append((target, KroneckerEigen(**placed, factors=factors.get(target.name))))  # type: ignore[arg-type]
        config = CurvatureConfig(**meta["record"].pop("config"))
        chosen = {name: meta[name] for name in ("prior_precision", "temperature", "noise_std")}
        chosen["choice"] = PrecisionChoice.from_dict(meta.get("choice", {"method": "given"}))
        record = FitRecord(config=config, **{"noise_version": 1, **meta["record"]})
        check_noise_version(record.noise_version)
        return cls(model, layers, record, outputs_of=outputs_of, **chosen)


def check_laplace(posterior: Any) -> None:
    """A `LaplacePosterior`.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(posterior, LaplacePosterior):
        raise TypeError(f"`posterior` must be a LaplacePosterior, as `fit` returns it, got {type(posterior).__name__}.")
