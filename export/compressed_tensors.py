"""The compressed-tensors layout, `pack-quantized`: what vLLM, SGLang and transformers load.

For a linear P with weight (n, k), b bits and g groups:

    P.weight_packed      int32  (n, ceil(k b / 32))   code + 2^(b-1), lowest bits first, along the inputs
    P.weight_scale       float  (n, g)                g = 1 per channel
    P.weight_shape       int64  (2,)                  n, k
    P.weight_zero_point  int32  (ceil(n b / 32), g)   asymmetric only; zero + 2^(b-1), packed along the outputs

Symmetric files hold no zero points. Codes and zeros are signed in this dialect: an unsigned code u of ours is
u - 2^(b-1) here, which packs to u again, so the packed words are the same for both.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from export.errors import CheckpointError
from quant.packing import pack, unpack
from quant.qtensor import QTensor
from quant.scheme import Scheme, make_scheme

NAME = "compressed-tensors"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def reason_against(scheme: Scheme) -> str | None:
    """Why this layout cannot hold a scheme that our own types can write, or None."""
    if not scheme.symmetric and scheme.bits == 8:
        return "asymmetric 8-bit weights have no kernel in the engines that read compressed-tensors; use --sym"
    return None


def write(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The file's tensors for the linear `name`."""
    bits, bias = weight.scheme.bits, weight.scheme.qtype.bias
    tensors = {
        f"{name}.weight_packed": pack(weight.codes.to(torch.int32) + bias, bits),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zeros is not None:
        tensors[f"{name}.weight_zero_point"] = pack((weight.zeros + bias).T, bits).T.contiguous()
    return tensors


def read(name: str, tensor: Callable[[str], Tensor], scheme: Scheme) -> QTensor:
    """The weight of the linear `name`; `tensor` reads a tensor of the file by name.

    Raises CheckpointError where packed words, scales and shape contradict one another or the scheme.
    """
    packed, scales = tensor(f"{name}.weight_packed"), tensor(f"{name}.weight_scale")
    shape = tensor(f"{name}.weight_shape").tolist()
    try:
        if not isinstance(shape, list) or len(shape) != 2:
            raise ValueError(f"weight_shape is {shape}, not outputs and inputs")
        n, k = shape
        _require_words(packed, "weight_packed", 0, n)
        codes = unpack(packed, scheme.bits, k)
        zeros = None
        if scheme.symmetric:
            codes = (codes.to(torch.int16) - scheme.qtype.bias).to(torch.int8)
        else:
            words = tensor(f"{name}.weight_zero_point")
            _require_words(words, "weight_zero_point", 1, scheme.groups(k))
            zeros = unpack(words.T.contiguous(), scheme.bits, n).T.to(torch.int32)
        return QTensor(codes, scales, zeros, scheme)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _require_words(words: Tensor, what: str, dim: int, size: int) -> None:
    """ValueError where `words` are no matrix of int32 with `size` along `dim`."""
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[dim] != size:
        raise ValueError(f"{what} is {words.dtype} {list(words.shape)}; int32 with {size} along dimension {dim} fits")


def linears(names: Iterable[str]) -> list[str]:
    """The quantized linears among a file's tensor names."""
    return [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]


def quantization_config(schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
    """The quantization_config of config.json.

    schemes      scheme of every quantized linear, by its name in the file
    unquantized  names of the linears that keep their weight: each is listed under `ignore`

    One scheme targets the class `Linear`; several target their linears by patterns, or by name where no pattern fits.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    groups = {}
    for i, (scheme, names) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else _targets(names, schemes)
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": _weight_args(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(unquantized),
        "config_groups": groups,
    }


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    grouped = scheme.group_size > 0
    args: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "dynamic": False,
    }
    return args | ({"group_size": scheme.group_size} if grouped else {})


def _targets(names: list[str], schemes: Mapping[str, Scheme]) -> list[str]:
    """Patterns for role names (the part behind the block's number) whose linears all belong here, else exact names."""
    here = set(names)
    roles: dict[str, list[str]] = {}
    for name in schemes:
        roles.setdefault(_role(name), []).append(name)
    targets: list[str] = []
    for role, members in roles.items():
        inside = [name for name in members if name in here]
        whole = inside and len(inside) == len(members) and role != members[0]
        # the number belongs to the pattern: `.*\.down_proj$` would also match a shared expert's
        targets += [rf"re:.*\.\d+\.{re.escape(role)}$"] if whole else inside
    return targets


def _role(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`: what follows the last number."""
    return re.split(r"\.\d+\.", name)[-1]


def schemes_of(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """The scheme that a quantization_config gives each quantized linear of `names`.

    Raises CheckpointError where no group targets one of them, or where a group makes no sense.
    """
    try:
        groups = [(group["targets"], _scheme_from(group["weights"])) for group in config["config_groups"].values()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"config.json: its quantization_config cannot be followed ({error!r})") from error
    return {name: _scheme_of(name, groups) for name in names}


def _scheme_from(args: Mapping[str, Any]) -> Scheme:
    return make_scheme(args["num_bits"], args.get("group_size") or -1, args["symmetric"])


def _scheme_of(name: str, groups: list[tuple[list[str], Scheme]]) -> Scheme:
    for exact in (True, False):
        for targets, scheme in groups:
            if any(_matches(name, target, exact) for target in targets):
                return scheme
    raise CheckpointError(f"config.json: no config group targets the quantized linear {name!r}")


def _matches(name: str, target: str, exact: bool) -> bool:
    if target.startswith("re:"):
        return exact and re.match(target[3:], name) is not None
    return name == target if exact else target == "Linear"
