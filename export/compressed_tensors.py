"""The compressed-tensors layouts `pack-quantized`, `int-quantized` and `float-quantized`, read by vLLM, SGLang and
transformers.

For a linear P with weight (n, k), b bits and g groups, weight-only (pack-quantized):

    P.weight_packed      int32  (n, ceil(k b / 32))   code + 2^(b-1), packed along the inputs, lowest bits first;
                                                      codes of 3, 5, 6 and 7 bits may lie in two words
    P.weight_scale       float  (n, g)                g = 1 per channel
    P.weight_shape       int64  (2,)                  n, k
    P.weight_zero_point  int32  (ceil(n b / 32), g)   asymmetric only; zero + 2^(b-1), packed along the outputs

Integers with 8-bit activations (int-quantized), and floats with or without quantized activations (float-quantized):

    P.weight             int8 or float8_e4m3fn  (n, k)
    P.weight_scale       float                  (n, 1)
    P.input_scale        float32                (1,)   only with one calibrated scale for all tokens

Symmetric files have no zero points. Codes and zeros are signed in this dialect: an unsigned code u of ours is u -
2^(b-1) here, which is packed as u again. So the packed words are equal.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.format import Format, Reader, Shapes, require_words
from lowbit.export.patterns import Patterns
from lowbit.quant.numbers import Number, float_of, integer_of
from lowbit.quant.packing import pack, unpack
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import INPUTS, Scheme, Side, granularity_of

NAME = "compressed-tensors"
PACKED, PLAIN, FLOAT, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight", "input_scale")


def layout_of(scheme: Scheme) -> str:
    """The name of the layout for a scheme."""
    if not scheme.number.is_integer:
        return FLOAT
    return PACKED if scheme.inputs is None else PLAIN


def _read_plain(name: str, tensor: Reader, scheme: Scheme) -> QTensor:
    codes, scales = tensor(f"{name}.weight"), tensor(f"{name}.weight_scale")
    if tuple(scales.shape) in ((), (1,)) and codes.ndim == 2:
        scales = scales.reshape(1, 1).repeat(
            codes.shape[0], 1
        )  # one scale for the whole weight, repeated for every row
    input_scale = None
    if scheme.static_inputs:
        input_scale = tensor(f"{name}.input_scale").float()
        if input_scale.numel() != 1:
            raise ValueError(f"input_scale has the shape {list(input_scale.shape)}; one number is needed")
        input_scale = input_scale.reshape(())
    return QTensor(codes, scales, None, scheme, input_scale)


def _read_packed(name: str, tensor: Reader, scheme: Scheme) -> QTensor:
    packed, scales = tensor(f"{name}.weight_packed"), tensor(f"{name}.weight_scale")
    n, k = _declared_shape(name, tensor)
    require_words(packed, "weight_packed", (n, None))
    codes = unpack(packed, scheme.bits, k)
    zeros = None
    if scheme.symmetric:
        codes = (codes.to(torch.int16) - scheme.number.bias).to(torch.int8)
    else:
        words = tensor(f"{name}.weight_zero_point")
        require_words(words, "weight_zero_point", (None, scheme.groups(k)))
        zeros = unpack(words.T.contiguous(), scheme.bits, n).T.to(torch.int32)
    return QTensor(codes, scales, zeros, scheme)


def _declared_shape(name: str, tensor: Reader) -> tuple[int, int]:
    """weight_shape as two integers. CheckpointError if it is anything else."""
    found = tensor(f"{name}.weight_shape")
    if found.dtype not in (torch.int64, torch.int32) or tuple(found.shape) != (2,):
        raise CheckpointError(f"{name}: weight_shape is {found.dtype} {list(found.shape)}; int64, n and k, fits")
    return int(found[0]), int(found[1])


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    grouped = scheme.group_size > 0
    args = _number_args(scheme.number) | {"strategy": "group" if grouped else "channel", "dynamic": False}
    return args | ({"group_size": scheme.group_size} if grouped else {})


def _input_args(inputs: Side) -> dict[str, Any]:
    return _number_args(inputs.number) | {"strategy": str(inputs.granularity), "dynamic": not inputs.static}


def _number_args(number: Number) -> dict[str, Any]:
    return {"num_bits": number.bits, "type": "int" if number.is_integer else "float", "symmetric": number.signed}


def _targets(names: list[str], schemes: Mapping[str, Scheme]) -> list[str]:
    """Target patterns: a role (the name after the block number) if all its linears belong here, exact names
    otherwise."""
    here = set(names)
    roles: dict[str, list[str]] = {}
    for name in schemes:
        roles.setdefault(_role(name), []).append(name)
    targets: list[str] = []
    for role, members in roles.items():
        inside = [name for name in members if name in here]
        whole = inside and len(inside) == len(members) and role != members[0]
        # with the number in the pattern: `.*\.down_proj$` would also match the linear of a shared expert
        targets += [rf"re:.*\.\d+\.{re.escape(role)}$"] if whole else inside
    return targets


def _role(name: str) -> str:
    """The role of a linear: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj`, the name after the last
    number."""
    return re.split(r"\.\d+\.", name)[-1]


def _group_scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    """The scheme of a config group. ValueError for a group that no scheme or layout of ours matches."""
    weights, layout = group["weights"], group.get("format") or config.get("format")
    if weights.get("dynamic") or group.get("output_activations"):
        raise ValueError("only static weights with unquantized outputs are supported")
    if weights.get("strategy") not in (None, "group", "channel", "tensor"):
        raise ValueError(f"weights with strategy {weights['strategy']!r} are not supported")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise ValueError("inputs are grouped in another order (actorder 'group'), which engines no longer support")
    side = Side(_number_of(weights), granularity_of(weights.get("group_size") or -1))
    scheme = Scheme(side, _inputs_of(group.get("input_activations")))
    if layout not in (None, MIXED, layout_of(scheme)):
        raise ValueError(f"{scheme} stored as {layout!r}; it is read as {layout_of(scheme)!r}")
    return scheme


def _number_of(args: Mapping[str, Any]) -> Number:
    """The number type of a group's weights. ValueError for an unsupported type."""
    kind, bits, symmetric = args.get("type", "int"), args["num_bits"], args["symmetric"]
    if kind not in ("int", "float") or (kind == "float" and not symmetric):
        raise ValueError(f"{'' if symmetric else 'asymmetric '}weights of type {kind!r} are not supported")
    return integer_of(bits, symmetric) if kind == "int" else float_of(bits)


def _inputs_of(args: Mapping[str, Any] | None) -> Side | None:
    """The quantized inputs in a group's input_activations. ValueError for unsupported ones."""
    if not args:
        return None
    for inputs in INPUTS.values():
        if all(args.get(key) == value for key, value in _input_args(inputs).items()):
            return inputs
    raise ValueError(
        f"inputs quantized as {dict(args)}: symmetric int8 or fp8, dynamic per token or static per tensor, is supported"
    )


class _Targets:
    """Targets of config groups, in order: the first name or pattern that matches a linear, or else the class
    `Linear`."""

    def __init__(self, targets: Iterable[tuple[str, Scheme]]) -> None:
        self._named: dict[str, tuple[int, Scheme]] = {}
        self._fitted: list[tuple[int, str, Scheme]] = []
        self._patterns = Patterns()
        for place, (target, scheme) in enumerate(targets):
            if target.startswith("re:"):
                self._fitted.append((place, target[3:], scheme))
            else:
                self._named.setdefault(target, (place, scheme))

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of the linear `name`. CheckpointError if no group targets it."""
        named = self._named.get(name)
        for place, pattern, scheme in self._fitted:
            if named is not None and named[0] < place:
                break
            if self._patterns.begins(pattern, name):
                return scheme
        found = named or self._named.get("Linear")
        if found is None:
            raise CheckpointError(f"config.json: no config group targets the quantized linear {name!r}")
        return found[1]


class CompressedTensors(Format):
    """The format `compressed-tensors`."""

    name = NAME
    method = NAME
    package = "compressed-tensors"
    suffixes = SUFFIXES
    marker = "weight_scale"
    loading = (
        "The files follow the compressed-tensors layout. vLLM and SGLang load the directory as it is; transformers "
        "does with the package `compressed-tensors` installed."
    )

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why this layout cannot hold a scheme, or None."""
        if not scheme.symmetric and scheme.bits != 4:
            return (
                f"asymmetric {scheme.bits}-bit weights have no kernel in the engines that read compressed-tensors; "
                "use --sym"
            )
        if scheme.weights.scales is not None:
            return f"scales of {scheme.weights.scales.name} are not written"
        if layout_of(scheme) == FLOAT and scheme.group_size != -1:
            return f"engines read {scheme.number.name} weights with one scale per channel, not per group"
        return None

    def caveat(self, scheme: Scheme) -> str | None:
        """A warning about loading the scheme in other programs, or None."""
        if scheme.symmetric:
            return None
        return (
            "transformers 5.23 with compressed-tensors 0.20 does not load asymmetric weights unless told "
            "CompressedTensorsConfig(dequantize=True); vLLM does"
        )

    def reason_in(self, engine: str, scheme: Scheme) -> str | None:
        """The reason why an engine cannot load weights of a scheme, or None."""
        if engine == "transformers" and not scheme.symmetric:
            return "with compressed-tensors 0.20 it loads asymmetric weights only with dequantize=True"
        return None

    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`."""
        if layout_of(weight.scheme) != PACKED:
            tensors = {f"{name}.weight": weight.codes, f"{name}.weight_scale": weight.scales}
            if weight.input_scale is not None:
                tensors[f"{name}.input_scale"] = weight.input_scale.reshape(1)
            return tensors
        bits, bias = weight.scheme.bits, weight.scheme.number.bias
        tensors = {
            f"{name}.weight_packed": pack(weight.codes.to(torch.int32) + bias, bits),
            f"{name}.weight_scale": weight.scales,
            f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zeros is not None:
            tensors[f"{name}.weight_zero_point"] = pack((weight.zeros + bias).T, bits).T.contiguous()
        return tensors

    def read(self, name: str, tensor: Reader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`; `tensor` reads a tensor of the file by its name.

        CheckpointError if packed words, scales and shape contradict each other or the scheme.
        """
        try:
            return (_read_packed if layout_of(scheme) == PACKED else _read_plain)(name, tensor, scheme)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def shape(self, name: str, shapes: Shapes, tensor: Reader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`."""
        if layout_of(scheme) == PACKED:
            return _declared_shape(name, tensor)
        sizes = shapes(f"{name}.weight")
        if len(sizes) != 2:
            raise CheckpointError(f"{name}: its shape is {sizes}, not outputs and inputs")
        return sizes[0], sizes[1]

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json.

        schemes      scheme of every quantized linear, by its name in the file
        unquantized  names of linears left in 16 bits; each is listed under `ignore`

        A single scheme targets the class `Linear`. Several schemes target their linears by patterns, or by name if none
        fits.
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
                "input_activations": None if scheme.inputs is None else _input_args(scheme.inputs),
                "output_activations": None,
                "format": layout_of(scheme),
            }
        layouts = {layout_of(scheme) for scheme in by_scheme}
        return {
            "quant_method": NAME,
            "format": layouts.pop() if len(layouts) == 1 else MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": sorted(unquantized),
            "config_groups": groups,
        }

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme that a quantization_config gives each quantized linear of `names`.

        CheckpointError if no group targets a linear, or if a group is malformed or not supported.
        """
        try:
            targets = _Targets(
                (target, _group_scheme(group, config))
                for group in config["config_groups"].values()
                for target in group["targets"]
            )
            return {name: targets.scheme_of(name) for name in names}
        except CheckpointError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"config.json: its quantization_config cannot be followed ({error!r})") from error


COMPRESSED_TENSORS = CompressedTensors()
