"""Which names of a model stand for one tensor, and what transformers is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

TIES, _EXPAND = "all_tied_weights_keys", "get_expanded_tied_weights_keys"  # a model's list, and how it is made anew

Owner = tuple[str, str]
"""A module's name, and a Parameter's name there."""


def full_name(owner: Owner) -> str:
    """The Parameter's name in the model."""
    return ".".join(filter(None, owner))


def ties_of(model: nn.Module, owners: Iterable[Sequence[Owner]]) -> dict[str, str]:
    """Return every further name of each distinct tensor with several owners, and the first one.

    And what transformers' list says, and holds, of one of them and a Parameter that is not random.
    """
    shared = [[full_name(owner) for owner in one] for one in owners]
    random = {name for names in shared for name in names}
    others = {t: s for t, s in _shared(model).items() if (t in random) != (s in random)}
    return others | {name: names[0] for names in shared for name in names[1:]}


def declare_ties(model: nn.Module, ties: Mapping[str, str], random: Iterable[str]) -> None:
    """Let transformers' list of ties say of the random tensors exactly what is tied, and the same of their scales.

    A checkpoint so holds a shared scale once, and a reload ties what was tied: the list is made from the
    configuration, which may call a head tied that has a weight of its own.

    Args:
        model: whose list changes, in place; a model without one stays as it is.
        ties: by every further name of a tensor, its first one.
        random: names of the tensors of which the list is to say this; of others it stays.
    """
    declared: dict[str, str] | None = vars(model).get(TIES)
    if declared is None:
        return
    concerned = set(random)
    kept = {t: s for t, s in declared.items() if not {t, s} & concerned or _root(ties, t) == _root(ties, s)}
    known = {*kept, *kept.values()}
    kept |= {t: s for t, s in ties.items() if not {t, s} <= known}
    declared.clear()
    declared.update(_with_scales(model, kept))


class HeldTies:
    """Stands in for a converted model's `get_expanded_tied_weights_keys`: the ties that it has, and no others.

    transformers takes the names of its table as patterns, so "decoder.bias" would tie "decoder.bias_rho" to the bias
    too; and it goes by the configuration, not by what is shared.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.ties = model, _with_scales(model, _shared(model))

    def __call__(self, all_submodels: bool = False) -> dict[str, str]:
        """As the method: of this model alone, or of all models inside it."""
        if not all_submodels:
            return dict(self.ties)
        found: dict[str, str] = getattr(type(self.model), _EXPAND)(self.model, all_submodels=True)
        return found


def hold_ties(model: nn.Module) -> None:
    """From now on `tie_weights()`, of the model or of one inside it, keeps the ties that there are and makes none."""
    for module in model.modules():
        if hasattr(type(module), _EXPAND):
            module.__dict__[_EXPAND] = HeldTies(module)


def release_ties(model: nn.Module) -> None:
    """Undo :func:`hold_ties`."""
    for module in model.modules():
        module.__dict__.pop(_EXPAND, None)


def _root(ties: Mapping[str, str], name: str) -> str:
    return _root(ties, ties[name]) if name in ties else name


def _with_scales(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """The ties, and those of the scales of what they tie."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    scales = {f"{t}_rho": f"{s}_rho" for t, s in ties.items()}
    return {**ties, **{t: s for t, s in scales.items() if {t, s} <= names}}


def _shared(model: nn.Module) -> dict[str, str]:
    """Of a model's list of ties those that hold; one that is being loaded has not made them yet."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        target: source
        for target, source in (vars(model).get(TIES) or {}).items()
        if target not in parameters or parameters[target].is_meta or parameters[target] is parameters.get(source)
    }
