"""`fit_laplace`: a trained, unconverted model's Laplace posterior, from the Trainer's data, collator and processes."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from torch import nn
from transformers import set_seed
from transformers.trainer_utils import has_length

from ..checkpoint.saving import carry
from ..checks import check_count
from ..conversion.convert import is_bayesian
from ..forward import vocabulary_size
from ..laplace import LaplaceConfig, LaplaceOptions, LaplacePosterior, fit
from ..laplace.config import PriorChoice, settled
from ..laplace.data import likelihood_of
from ..laplace.evidence import Precision
from ..laplace.perturbed import TokenMask
from ..likelihoods import HEAD, NoiseStd, get_likelihood, resolve_problem_type
from ..posteriors import BasePosterior
from ..posteriors.files import check_model
from ..sampling.views import unwrapped_forward
from ..sharding import is_sharded
from .arguments import parse_noise_std
from .checks import check_dataset
from .elbo import preserved_rng
from .evaluation import MonteCarloTrainer
from .held_out import COLLATED, choose_rows, said_choice
from .items import LABEL_NAMES, as_labels
from .sharding import sharded_batches

__all__ = ["LaplaceTrainer"]

logger = logging.getLogger(__name__)

_OWN = "posterior"
"""The attribute under which a model carries its posterior."""


class LaplaceTrainer(MonteCarloTrainer):
    """A Trainer that fits a Laplace posterior and then evaluates with it.

    It also takes up the posterior that a model brings along (`bayeformers.from_pretrained`).
    """

    def __init__(self, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        own = getattr(self.model, _OWN, None)
        if isinstance(own, BasePosterior) and not is_bayesian(self.model):
            check_model(own, self.model, "`model.posterior`")
            self._posterior = own

    def fit_laplace(
        self,
        train_dataset: Any = None,
        config: LaplaceConfig | None = None,
        *,
        prior_mean: nn.Module | None = None,
        noise_std: float | None = None,
        validation_dataset: Any = None,
        batch_size: int | None = None,
        seed: int = 0,
        **options: Unpack[LaplaceOptions],
    ) -> LaplacePosterior:
        """Fit a Laplace posterior around the trained weights, which stay as they are; `laplace.fit` says how.

        One pass over the data in `eval()` mode, in the model's own precision, from the batch's labels and the logits
        alone: the loss of training, its weights and smoothing play no part. Under a launcher every process takes its
        share and all end with the same posterior. `evaluate` and `predict` use it from then on; `save_model` saves it;
        `train` drops it. A warning says which prior precision was chosen, how, and on which rows.

        Refused (a TypeError or ValueError) before anything changes are a converted model; sharded or replicated
        parameters; no data, or fewer examples than processes; a head without a Laplace posterior; and options that
        `laplace.fit` refuses.

        Args:
            train_dataset: the data; by default the trainer's.
            config: how to fit, see `bayeformers.laplace.LaplaceConfig`. Of ``num_batches`` the examples are chosen at
                random; ``num_data`` is by default the dataset's length, ``link`` `args.eval_link`.
            prior_mean: the model that holds the prior's mean, such as the pretrained one; by default 0.
            noise_std: s of a regression; by default `args.noise_std` if that is a number, else that of most evidence.
                Evaluation predicts with the same.
            validation_dataset: held-out data of prior_precision="holdout"; by default the `eval_dataset`, as of early
                stopping. Where nothing is said, labelled held-out rows of one set choose the prior precision; without
                any, training rows with words masked (by the tokenizer's mask token) or values exchanged do, else
                their leverages.
            batch_size: of one process; by default `args.per_device_eval_batch_size`. It changes nothing.
            seed: of the chosen examples, of fisher="mc"'s labels and of a random data collator.
            **options: fields of the configuration by name; they replace those of ``config``.

        Returns:
            The posterior, also `trainer.posterior`.
        """
        self._check_can_fit()
        data = self.train_dataset if train_dataset is None else train_dataset
        config = settled(config, options)
        self._check_data(data, config)
        labels = [*(self.label_names or ()), *LABEL_NAMES, *COLLATED]
        held_out = choose_rows(
            self.model,
            config.prior_precision,
            validation_dataset,
            self.eval_dataset,
            training=data,
            label_names=labels,
        )
        size = self.args.per_device_eval_batch_size if batch_size is None else batch_size
        check_count("batch_size", size, 1)
        check_count("seed", seed, 0)
        noise_std = self._given_noise() if noise_std is None else noise_std
        start = time.perf_counter()
        with self._measuring(seed):
            rows = held_out.data
            posterior = fit(
                self.model,
                self._curvature_batches(data, "training", size, config.num_batches, seed),
                self._resolved(config, held_out.prior_precision, data),
                prior_mean=prior_mean,
                noise_std=noise_std,
                validation=None if rows is None else self._curvature_batches(rows, "validation", size),
                token_mask=self._token_mask(),
                seed=seed,
            )
        self._adopt(posterior, time.perf_counter() - start)
        if self.is_world_process_zero():
            seen = None if config.num_batches is None else config.num_batches * size * self.args.world_size
            logger.warning(said_choice(posterior, held_out, posterior.record.num_data, seen))
        return posterior

    def _resolved(
        self, config: LaplaceConfig, prior_precision: Precision | PriorChoice | None, data: Any
    ) -> LaplaceConfig:
        """What the trainer knows in place of what the configuration leaves open."""
        shows = not self.args.disable_tqdm if config.progress is None else config.progress
        return replace(
            config,
            prior_precision=prior_precision,
            link=self.args.eval_link if config.link == "auto" else config.link,
            num_data=len(data) if config.num_data is None and has_length(data) else config.num_data,
            progress=shows and self.is_world_process_zero(),
        )

    def _token_mask(self) -> TokenMask | None:
        """That of the trainer's or its collator's tokenizer, if that has a mask token, which the model knows."""
        collator = getattr(self.data_collator, "tokenizer", None)
        tokenizer = collator if self.processing_class is None else self.processing_class
        token = getattr(tokenizer, "mask_token_id", None)
        size = vocabulary_size(self.model)
        if not isinstance(token, int) or (size is not None and token >= size):
            return None
        return TokenMask(mask_token_id=token, kept=tuple(getattr(tokenizer, "all_special_ids", ())))

    def _given_noise(self) -> float | None:
        """Return a regression's `args.noise_std`, if that is a number.

        Raises:
            ValueError: the head predicts the noise.
        """
        has_noise = get_likelihood(resolve_problem_type(self.model)).has_noise
        noise_std = parse_noise_std(self.args.noise_std) if has_noise else None
        if noise_std == HEAD:
            raise ValueError(
                '`noise_std`="head" has no Laplace posterior, whose likelihood is a Gaussian of one noise: use a '
                'head that predicts the means only, and a number or "residual".'
            )
        return noise_std

    def noise_std(self) -> NoiseStd | None:
        """That of the Laplace posterior, whose weights were given their scale by it; else as ever."""
        if isinstance(self._posterior, LaplacePosterior) and not is_bayesian(self.model):
            return self._posterior.noise_std
        return super().noise_std()

    @contextlib.contextmanager
    def _measuring(self, seed: int) -> Iterator[None]:
        """The model in place, without accelerate's autocast; a collator's masks are drawn again in a resumed pass."""
        with preserved_rng(), unwrapped_forward(self.model):
            set_seed(seed)
            if self.place_model_on_device:
                self._move_model_to_device(self.model, self.args.device)
            yield

    def _check_can_fit(self) -> None:
        if is_bayesian(self.model):
            raise ValueError(
                "`fit_laplace` needs a model with one set of weights; this one's layers are Bayesian already. Call "
                "`to_deterministic(model)` to take the posterior mean, then make a trainer of it."
            )
        if isinstance(self.model, nn.DataParallel):
            raise ValueError(
                "`fit_laplace` cannot read layers inside nn.DataParallel: pass `model.module`, and start one process "
                "per GPU with `accelerate launch your_script.py`."
            )
        is_old = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
        if is_old or self.is_deepspeed_enabled:
            raise ValueError(
                "`fit_laplace` needs whole parameters in the forward, which FSDP1 and DeepSpeed shard. Use FSDP2, or "
                "save the model, and fit it without them: `accelerate launch --multi_gpu your_script.py`."
            )
        likelihood_of(self.model)  # a head whose labels are positions has none

    def _check_data(self, data: Any, config: LaplaceConfig) -> None:
        self._check_rows(data, "fit_laplace")
        if config.num_batches is not None and config.num_data is None and not has_length(data):
            raise ValueError("`num_batches` needs `num_data`, the number of examples: `train_dataset` has no length.")

    def _check_rows(self, data: Any, method: str) -> None:
        """Of a pass over training data that ``method`` makes: there are some, and one for each process at least."""
        if data is None:
            raise ValueError(f"`{method}` needs data: pass `train_dataset` here or to the trainer.")
        check_dataset(data, "train_dataset")
        if has_length(data) and len(data) < self.args.world_size:
            raise ValueError(f"`train_dataset` has {len(data)} examples for {self.args.world_size} processes.")

    def _curvature_batches(
        self, data: Any, description: str, batch_size: int, num_batches: int | None = None, seed: int = 0
    ) -> Iterable[Any]:
        collate = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return sharded_batches(
            data,
            partial(_labelled, collate, self.args.label_names),
            batch_size=batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            equal=is_sharded(self.model),
            num_batches=num_batches,
            seed=seed,
            length_names=self._length_names(),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _adopt(self, posterior: LaplacePosterior, seconds: float) -> None:
        self.posterior = posterior
        if posterior.record.config.fisher == "empirical":
            self._say(
                'fisher="empirical" is no estimate of the curvature: its gradients vanish where a model fits its '
                'training data. Prefer "exact" or "mc".'
            )
        report = _report(posterior, seconds)  # of a sharded model all processes are asked for their weights
        if self.is_world_process_zero():
            logger.info(report)
            for reason, names in _by_reason(posterior.record.skipped).items():
                logger.info("Deterministic (%s): %s.", reason, ", ".join(names))

    def _drop_posterior(self) -> None:
        """Before the weights move: a posterior is that of the weights it was fitted to, unless it follows them."""
        if self._posterior is not None and not self._posterior.follows_weights:
            logger.warning("Training goes on: `trainer.posterior`, fitted to the earlier weights, is dropped.")
            self._posterior = None
            carry(self.model, None)
        own = getattr(self.model, _OWN, None)
        if isinstance(own, BasePosterior) and not own.follows_weights:
            delattr(self.model, _OWN)


def _labelled(collate: Callable[[list[Any]], Any], label_names: list[str] | None, rows: list[Any]) -> Any:
    batch = collate(rows)
    return as_labels(batch, label_names) if isinstance(batch, Mapping) else batch


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        found.setdefault(reason, []).append(name or "the model itself")
    return found


def _report(posterior: LaplacePosterior, seconds: float) -> str:
    has_labels = not math.isnan(posterior.record.log_likelihood)
    evidence = f"{posterior.log_marginal_likelihood:.2f}" if has_labels else "unknown (no labels)"
    return f"Fitted {posterior!r} in {seconds:.1f} s; log marginal likelihood {evidence}."
