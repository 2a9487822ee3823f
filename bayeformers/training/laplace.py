"""`fit_laplace`: a trained, unconverted model's Laplace posterior, from the Trainer's data, collator and processes."""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import has_length

from ..checkpoint.saving import carry
from ..checks import check_count
from ..conversion.convert import is_bayesian
from ..laplace import LaplacePosterior, fit
from ..laplace.curvature import CurvatureKind, WeightSharing
from ..laplace.data import likelihood_of
from ..laplace.evidence import Precision
from ..laplace.targets import Subset
from ..laplace.tuning import PriorChoice
from ..likelihoods import HEAD, NoiseStd, get_likelihood, resolve_problem_type
from ..likelihoods.loss_hessian import Fisher
from ..patterns import Patterns
from .arguments import parse_noise_std
from .checks import check_dataset
from .elbo import preserved_rng
from .evaluation import MonteCarloTrainer
from .held_out import COLLATED, choose_rows, said_choice
from .items import LABEL_NAMES, as_labels
from .precision import own_precision
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
        if isinstance(own, LaplacePosterior) and not is_bayesian(self.model):
            self._posterior = own

    def fit_laplace(
        self,
        train_dataset: Any = None,
        *,
        subset: Subset = "all",
        target_modules: Patterns | None = None,
        exclude_modules: Patterns | None = None,
        curvature: CurvatureKind | Literal["auto"] = "auto",
        fisher: Fisher | Literal["auto"] = "auto",
        weight_sharing: WeightSharing = "expand",
        prior_precision: Precision | PriorChoice | None = None,
        prior_mean: nn.Module | None = None,
        temperature: float = 1.0,
        noise_std: float | None = None,
        validation_dataset: Any = None,
        num_batches: int | None = None,
        num_data: int | None = None,
        num_mc_samples: int = 1,
        batch_size: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_steps: int = 100,
        progress: bool | None = None,
    ) -> LaplacePosterior:
        """Fit a Laplace posterior around the trained weights, which stay as they are; `laplace.fit` says how.

        One pass over the data in `eval()` mode, in the model's own precision, from the batch's labels and the logits
        alone: the loss of training, its weights and smoothing play no part. Under a launcher every process takes its
        share and all end with the same posterior. `evaluate` and `predict` use it from then on; `save_model` saves it;
        `train` drops it.

        Args:
            train_dataset: the data; by default the trainer's.
            subset, target_modules, exclude_modules: the layers to cover.
            curvature, fisher, weight_sharing, num_mc_samples: how their curvature is measured.
            prior_precision: tau, or how to find it: "marglik", "marglik_per_layer" or "holdout". By default "holdout"
                where there are labelled held-out rows of one set, else "marglik". A warning says what was chosen, how,
                and on which rows.
            temperature: T of the likelihood p(y | x)^(1/T).
            noise_std: s of a regression; by default `args.noise_std` if that is a number, else that of most evidence.
                Evaluation predicts with the same.
            prior_mean: the model that holds the prior's mean, such as the pretrained one; by default 0.
            validation_dataset: held-out data of "holdout"; by default the `eval_dataset`, as of early stopping.
            num_batches: so many batches of every process, of examples chosen at random; the curvature is scaled up to
                ``num_data``.
            num_data: N, the examples that the curvature stands for, those without a label (-100) included; by default
                the dataset's length.
            batch_size: of one process; by default `args.per_device_eval_batch_size`. It changes nothing.
            seed: of the chosen examples, of fisher="mc"'s labels and of a random data collator.
            device: of the sums and eigenvectors; by default the model's.
            checkpoint: a file for the sums, written every ``checkpoint_steps`` batches. If it exists, the pass goes on
                where it stopped, for the same data, batch size and number of processes.
            checkpoint_steps: see ``checkpoint``.
            progress: show progress bars; by default unless `args.disable_tqdm`.

        Returns:
            The posterior, also `trainer.posterior`.

        Raises:
            TypeError, ValueError: before anything changes: a converted model; sharded or replicated parameters; no
                data, or fewer examples than processes; a head without a Laplace posterior; another argument that
                `laplace.fit` refuses.
        """
        self._check_can_fit()
        data = self.train_dataset if train_dataset is None else train_dataset
        self._check_data(data, num_batches, num_data)
        held_out = choose_rows(
            self.model,
            prior_precision,
            validation_dataset,
            self.eval_dataset,
            training=data,
            label_names=[*(self.label_names or ()), *LABEL_NAMES, *COLLATED],
        )
        size = self.args.per_device_eval_batch_size if batch_size is None else batch_size
        check_count("batch_size", size, 1)
        check_count("seed", seed, 0)
        if noise_std is None and get_likelihood(resolve_problem_type(self.model)).has_noise:
            given = parse_noise_std(self.args.noise_std)
            if given == HEAD:
                raise ValueError(
                    '`noise_std`="head" has no Laplace posterior, whose likelihood is a Gaussian of one noise: use a '
                    'head that predicts the means only, and a number or "residual".'
                )
            noise_std = given
        shows = (not self.args.disable_tqdm if progress is None else progress) and self.is_world_process_zero()
        start = time.perf_counter()
        with self._measuring(seed):
            posterior = fit(
                self.model,
                self._curvature_batches(data, "training", size, num_batches, seed),
                subset=subset,
                target_modules=target_modules,
                exclude_modules=exclude_modules,
                curvature=curvature,
                fisher=fisher,
                weight_sharing=weight_sharing,
                prior_precision=held_out.prior_precision,
                prior_mean=prior_mean,
                temperature=temperature,
                noise_std=noise_std,
                validation=None
                if held_out.data is None
                else self._curvature_batches(held_out.data, "validation", size),
                link=self.args.eval_link,
                num_batches=num_batches,
                num_data=len(data) if num_data is None and has_length(data) else num_data,
                num_mc_samples=num_mc_samples,
                seed=seed,
                device=device,
                checkpoint=checkpoint,
                checkpoint_steps=checkpoint_steps,
                progress=shows,
            )
        self._adopt(posterior, time.perf_counter() - start)
        if self.is_world_process_zero():
            logger.warning(said_choice(posterior, held_out, posterior.record.num_data))
        return posterior

    def noise_std(self) -> NoiseStd | None:
        """That of the Laplace posterior, whose weights were given their scale by it; else as ever."""
        if isinstance(self._posterior, LaplacePosterior) and not is_bayesian(self.model):
            return self._posterior.noise_std
        return super().noise_std()

    @contextlib.contextmanager
    def _measuring(self, seed: int) -> Iterator[None]:
        """The model in its place and precision; a collator that draws masks draws them again in a resumed pass."""
        with preserved_rng(), own_precision(self.model):
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
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "`fit_laplace` needs whole parameters, which FSDP and DeepSpeed shard. Save the model, and fit it in a "
                "run without them: `accelerate launch --multi_gpu your_script.py`."
            )
        likelihood_of(self.model)  # a head whose labels are positions has none

    def _check_data(self, data: Any, num_batches: int | None, num_data: int | None) -> None:
        if data is None:
            raise ValueError("`fit_laplace` needs data: pass `train_dataset` here or to the trainer.")
        check_dataset(data, "train_dataset")
        for name, count in (("num_batches", num_batches), ("num_data", num_data)):
            if count is not None:
                check_count(name, count, 1)
        if has_length(data) and len(data) < self.args.world_size:
            raise ValueError(f"`train_dataset` has {len(data)} examples for {self.args.world_size} processes.")
        if num_batches is not None and num_data is None and not has_length(data):
            raise ValueError("`num_batches` needs `num_data`, the number of examples: `train_dataset` has no length.")

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
            num_batches=num_batches,
            seed=seed,
            length_names=self._length_names(),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _adopt(self, posterior: LaplacePosterior, seconds: float) -> None:
        self.posterior = posterior
        if getattr(self.model, _OWN, None) is not None:
            setattr(self.model, _OWN, posterior)  # in place of the one it brought along
        if posterior.record.config.fisher == "empirical":
            self._say(
                'fisher="empirical" is no estimate of the curvature: its gradients vanish where a model fits its '
                'training data. Prefer "exact" or "mc".'
            )
        if self.is_world_process_zero():
            logger.info(_report(posterior, seconds))
            for reason, names in _by_reason(posterior.record.skipped).items():
                logger.info("Deterministic (%s): %s.", reason, ", ".join(names))

    def _drop_posterior(self) -> None:
        """Before the weights move: a posterior is that of the weights it was fitted to."""
        if self._posterior is not None:
            logger.warning("Training goes on: `trainer.posterior`, fitted to the earlier weights, is dropped.")
            self._posterior = None
            carry(self.model, None)
        if isinstance(getattr(self.model, _OWN, None), LaplacePosterior):
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
