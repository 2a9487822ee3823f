"""What `model.save_pretrained` writes beside the weights: an exact record, digests of the tensors, a Laplace posterior.

transformers has no place for these, so importing bayeformers wraps its method. A model without a Bayesian layer, a
posterior or a stale record is saved as ever.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..conversion.persistence import told_of_adapters
from ..conversion.record import (
    bayesian_config,
    conversion_record,
    converted_module,
    update_config,
    without_stale_record,
)
from ..guarantees.attached import write_guarantees
from ..heads.find import find_head
from ..heads.persistence import without_stale_head
from ..nn.draws import bayesian_modules
from ..posteriors import BasePosterior, VariationalPosterior
from ..posteriors.files import saved_kinds
from ..sharding import is_sharded
from ..sharding.gathering import gathered, is_gathered
from ..storage import difference, file_digests, read_digests, write_digests
from .adapters import wrap_peft

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OWN = "posterior"
_CARRIED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def with_variant(name: str, variant: str | None) -> str:
    """As transformers names the files of a variant: "model.safetensors" -> "model.fp16.safetensors"."""
    stem, *endings = name.split(".")
    return ".".join([stem, *endings[:-1], *([variant] if variant else []), endings[-1]])


def digests_name(variant: str | None = None) -> str:
    """The file of digests beside a checkpoint's weights."""
    return with_variant("bayesian_digests.json", variant)


def carry(model: nn.Module, posterior: Any) -> None:
    """Let ``model.save_pretrained`` save a posterior that something else holds, such as a Trainer; None: no longer."""
    wrap_peft()
    _CARRIED.pop(model, None)
    if isinstance(posterior, BasePosterior) and posterior.file_name:
        _CARRIED[model] = weakref.ref(posterior)


def saved_along(model: nn.Module) -> BasePosterior | None:
    """The posterior that ``model.save_pretrained`` writes: the model's ``posterior``, or its Trainer's."""
    if not isinstance(model, PreTrainedModel):
        return None
    carried = _CARRIED.get(model)
    own = vars(model).get(_OWN) or (None if carried is None else carried())
    if not isinstance(own, BasePosterior) or not own.file_name or own.model is not model:
        return None
    is_of_layers = isinstance(getattr(own, "base", None), VariationalPosterior)  # which lie in the checkpoint itself
    return own if is_of_layers or not bayesian_modules(model) else None


def check_recorded(model: nn.Module) -> None:
    """Before a converted model is saved: its record names the layers that are Bayesian now, so that it can be read.

    A layer that was replaced since the conversion, such as a new head, is deterministic from now on.

    Raises:
        ValueError: the model was converted in parts, or has Bayesian layers that no reload would make.
    """
    if conversion_record(model) is None:
        _tell_without_record(model)
        return
    if (told := told_of_adapters(model)) is not None:
        logger.warning("`save_pretrained` of a %s", told)
    if converted_module(model) is not model:
        name = next(name for name, module in model.named_modules() if module is converted_module(model))
        raise ValueError(
            f"`save_pretrained`: only the part {name!r} of this {type(model).__name__} was converted, and a reload "
            f"could not rebuild it. Save that part by itself, or convert the model with `target_modules`: "
            f'`to_bayesian(model, target_modules=r"{name}\\..*")`.'
        )
    recorded = bayesian_config(model).modules
    layers = bayesian_modules(model).items()
    found = {name: {kind.__name__ for kind in type(module).__mro__} for name, module in layers}
    unknown = sorted(name for name, kinds in found.items() if recorded.get(name) not in kinds)
    if unknown:
        raise ValueError(
            f"`save_pretrained`: {unknown[:3]} ({len(unknown)}) are Bayesian layers that `to_bayesian` did not make, "
            "or that were moved since: a reload could not rebuild them. Call `to_deterministic(model)`, then "
            "`to_bayesian` again."
        )
    replaced = sorted(set(recorded) - set(found))
    if replaced:
        logger.warning(
            "%s (%d) were replaced after the conversion: they are saved as the deterministic layers that they are now. "
            "To make them Bayesian call `to_deterministic(model)`, then `to_bayesian` again.",
            replaced[:3],
            len(replaced),
        )
        _forget(model, replaced)


def _tell_without_record(model: nn.Module) -> None:
    """Warn where the layers of a model would be saved, and `from_pretrained` could not make them again."""
    if _is_part(model):
        logger.warning(
            "This %s was converted as a part of a larger module, which holds the record of the conversion: the "
            "saved folder has the scales, but `bayeformers.from_pretrained` cannot read them. Call `to_bayesian` "
            "on this model itself.",
            type(model).__name__,
        )
    elif bayesian_modules(model):
        logger.warning(
            "This %s has Bayesian layers that were built by hand: the saved folder has their scales, but "
            "`bayeformers.from_pretrained` cannot build them. Build the model as you did, and call "
            "`model.load_state_dict` of the folder's tensors.",
            type(model).__name__,
        )


def _forget(model: nn.Module, replaced: list[str]) -> None:
    """Out of the record; what stands there now is deterministic, and trains if it does."""
    config, modules = bayesian_config(model), dict(model.named_modules())
    gone = tuple(f"{name}." for name in replaced)
    fresh = [n for n in replaced if n in modules and any(p.requires_grad for p in modules[n].parameters())]
    ties = {t: s for t, s in (config.ties or {}).items() if not t.startswith(gone) and not s.startswith(gone)}
    update_config(
        model,
        modules={name: kind for name, kind in config.modules.items() if name not in replaced},
        modules_to_save=[*config.modules_to_save, *fresh],
        ties=None if config.ties is None else ties,
    )


def _is_part(model: nn.Module) -> bool:
    """Whether the layers have one scope of draws, to which another module's forward belongs."""
    scopes = {id(module.scope) for module in bayesian_modules(model).values()}
    own = {id(getattr(hook, "scope", None)) for hook in model._forward_pre_hooks.values()}
    return len(bayesian_modules(model)) > 1 and len(scopes) == 1 and not scopes & own


def _saving_posteriors(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if is_sharded(self) and not is_gathered(self) and "state_dict" not in given:
            with gathered(self) as writes_here:
                if writes_here:
                    self.save_pretrained(save_directory, *args, **kwargs)
            return
        check_recorded(self)
        folder, variant = Path(save_directory), given.get("variant")
        writes = self.should_save_on_this_rank(given.get("is_main_process", True)) and not folder.is_file()
        posterior = saved_along(self)
        if writes and posterior is None:
            _tell_unsaved(self)
        # first: a push to the hub takes them along
        if writes:
            write_guarantees(self, folder)
        is_saved = writes and posterior is not None and save_posterior(posterior, folder)
        before = _recorded(folder / digests_name(variant)) if writes and not is_saved else None
        if writes:
            (folder / digests_name(variant)).unlink(missing_ok=True)  # of the weights that are overwritten
        with without_stale_record(self), without_stale_head(self):
            original(self, save_directory, *args, **kwargs)
        if (
            writes
            and (posterior is not None or conversion_record(self) is not None or find_head(self) is not None)
            and not getattr(self, "_hf_peft_config_loaded", False)
        ):
            files = _written(folder, variant)
            if files:
                write_digests(folder / digests_name(variant), file_digests(files))
        if before is not None and difference(file_digests(_written(folder, variant)), before) is not None:
            _remove_posteriors(folder)

    return save_pretrained


def save_posterior(posterior: BasePosterior, folder: Path) -> bool:
    """Save a posterior in place of one that was saved there before, whatever its kind.

    Args:
        posterior: the posterior; one of no registered kind writes what it writes.
        folder: the model's.

    Returns:
        Whether it was saved: one of weights that have moved since is not.
    """
    if posterior.is_of_present_weights():
        for name in saved_kinds() if posterior.file_name else ():  # of another kind that was saved here before
            (folder / name).unlink(missing_ok=True)
        posterior.save(folder)
        return True
    kind = type(posterior).__name__.removesuffix("Posterior")
    logger.warning(
        "The model's weights have moved since its %s posterior was fitted: the posterior is not saved with "
        "them. Fit it again.",
        kind,
    )
    return False


def _tell_unsaved(model: nn.Module) -> None:
    own = vars(model).get(_OWN)
    if isinstance(own, BasePosterior) and own.file_name:
        why = "it is of another model" if own.model is not model else "the model's layers are a posterior themselves"
        logger.warning("`model.posterior` (%s) is not saved with the model: %s.", type(own).__name__, why)


def _recorded(path: Path) -> dict[str, str] | None:
    """The digests of weights that lie in a folder; None where there are none, or they cannot be read."""
    try:
        return read_digests(path) if path.is_file() else None
    except ValueError:
        return None


def _remove_posteriors(folder: Path) -> None:
    """Those of weights that were overwritten, which a reload would take for the new ones'."""
    stale = [name for name in saved_kinds() if (folder / name).is_file()]
    for name in stale:
        (folder / name).unlink()
    if stale:
        logger.warning("Removed %s from %r: the posterior of weights that were overwritten.", stale, str(folder))


def _written(folder: Path, variant: str | None) -> list[Path]:
    """The weights files of a folder; none of a distributed checkpoint."""
    single, index = folder / with_variant(WEIGHTS, variant), folder / with_variant(INDEX, variant)
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


PreTrainedModel.save_pretrained = _saving_posteriors(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]
