"""What a conversion needs of a model's weights: plain tensors, whole, and in memory. Anything else is refused by name.

A quantised or offloaded model would be converted by half: its float layers become random, the others stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from ..processes.dtensors import groups_of, is_managed, is_split

_QUANTISERS = (
    "aqlm", "auto_gptq", "auto_round", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm_gpu", "flute",
    "gptqmodel", "hqq", "optimum.quanto", "quanto", "quark", "sinq", "spqr_quant", "torch.ao.nn", "torch.nn.quantized",
    "torch.nn.intrinsic", "torchao", "vptq",
    *(f"transformers.integrations.{name}" for name in ("bitnet", "eetq", "fbgemm_fp8", "finegrained_fp8")),
    *(f"transformers.integrations.{name}" for name in ("gemma_quant", "higgs", "mxfp4", "nvfp4", "sinq", "vptq")),
)  # fmt: skip
_PACKED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "W_q")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LOAD_IN_FLOAT = (
    "Load the model in floating point (without `quantization_config`), convert and train it, and make it small with "
    "`bayeformers.quantization.quantize`; or name only float layers, such as LoRA's, in `target_modules`"
)
_SHARDED = (
    "Convert the model before it is sharded, and shard it by FSDP2 (`fully_shard`): with FSDP1, tensor or context "
    "parallelism (`tp_plan`) no forward has the weight whole, and it cannot be drawn"
)
_LOAD_WHOLE = "Load the model onto its device, without offloading"


def check_plain_weights(model: nn.Module, names: Collection[str], *, whole: bool) -> None:
    """Check before a conversion that the weights of some modules can be read and become posterior means.

    Args:
        model: to be converted; nothing in it changes.
        names: of the modules that are to become Bayesian.
        whole: whether the conversion is meant for all of the model, so that its being quantised is an error by itself.

    Raises:
        ValueError: they are quantised, offloaded, sharded, on the meta device, not yet made, or of a class of its own.
    """
    for name, module in model.named_modules():
        if name in names and (reason := why_not_plain(module)):
            place = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__}"
            raise ValueError(f"`model` cannot become Bayesian as it is: {place} {reason}. Nothing was changed.")
    method = quantised_by(model) if whole else None
    if method is not None:
        raise ValueError(
            f"`model` cannot become Bayesian as it is: it is quantised ({method}). {_LOAD_IN_FLOAT}. Nothing was "
            "changed."
        )


def quantised_by(model: nn.Module) -> str | None:
    """The method by which transformers quantised the model or a part of it; None: it did not."""
    for module in model.modules():
        if getattr(module, "is_quantized", False) is True or getattr(module, "hf_quantizer", None) is not None:
            method = getattr(module, "quantization_method", None)
            return str(getattr(method, "value", method))
    return None


def why_not_plain(module: nn.Module) -> str | None:
    """What is wrong with the module's own weights, and what to do; None: nothing."""
    if any(getattr(hook, "offload", False) for hook in _hooks(module)):
        return f"is offloaded by accelerate. {_LOAD_WHOLE}"
    if (package := _quantiser(module)) is not None:
        return f"is quantised ({package}). {_LOAD_IN_FLOAT}"
    for name, tensor in module._parameters.items():
        if tensor is None or (is_managed(module) and is_split(tensor) and len(groups_of(tensor)) < 2):
            continue  # by FSDP2, whose forward has it whole
        if reason := why_not_plain_tensor(tensor):
            return f"has a {name} that {reason}"
    return None


def why_not_plain_tensor(tensor: Tensor) -> str | None:
    """What keeps a Parameter from being a posterior mean, and what to do; None: nothing."""
    if nn.parameter.is_lazy(tensor):
        return "has no values yet. Run the model once"
    if getattr(tensor, "ds_shape", None) is not None and tensor.numel() == 0:
        return "is sharded by DeepSpeed. Convert the model before it is sharded"
    if tensor.is_meta:
        return f"is on the meta device, without values. {_LOAD_WHOLE}"
    if type(tensor) is not nn.Parameter:
        kind = type(tensor).__name__
        remedy = _SHARDED if kind in ("DTensor", "FlatParameter") else _LOAD_IN_FLOAT
        return f"is no plain tensor but a {kind}. {remedy}"
    is_small = tensor.dtype in (torch.int8, torch.uint8) and tensor.dim() > 1
    if is_small or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
        return f"is quantised ({tensor.dtype}). {_LOAD_IN_FLOAT}"
    return None


def _hooks(module: nn.Module) -> Iterator[object]:
    """The hook of accelerate on the module, or those that it runs one after another."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _quantiser(module: nn.Module) -> str | None:
    """The library whose quantised layer this is, by its class or by the buffers that it keeps."""
    for cls in type(module).__mro__:
        home = cls.__module__
        if any(home == name or home.startswith(f"{name}.") for name in _QUANTISERS):
            return home
    return type(module).__name__ if any(name in module._buffers for name in _PACKED) else None
