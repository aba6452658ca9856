"""The compressed-tensors layouts, read by vLLM, SGLang and transformers.

For a linear P with weight (n, k), b bits and g groups, weight-only, or int4 with FP8 inputs (pack-quantized):

    P.weight_packed      int32  (n, ceil(k b / 32))   code + 2^(b-1), packed along the inputs, lowest bits first;
                                                      codes of 3, 5, 6 and 7 bits may lie in two words
    P.weight_scale       float  (n, g)                g = 1 per channel
    P.weight_shape       int64  (2,)                  n, k
    P.weight_zero_point  int32  (ceil(n b / 32), g)   asymmetric only; zero + 2^(b-1), packed along the outputs
    P.weight_g_idx       int32  (k,)                  the group of each input, if they are in another order (actorder
                                                      "group"); read and never written

Integers with 8-bit activations (int-quantized), and floats with or without quantized activations (float-quantized):

    P.weight             int8 or float8_e4m3fn  (n, k)
    P.weight_scale       float                  (n, 1), or one for each block (ceil(n / rows), ceil(k / columns)), or
                                                (n, g) of int4
    P.input_scale        float32                (1,)   only with one calibrated scale for all tokens

Floats in groups (nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp8-quantized):

    P.weight_packed        uint8    (n, k / 2)  fp4: element 2 j in the low half of byte j; mxfp8: P.weight, as above
    P.weight_scale         float8_e4m3fn (n, k / 16), or uint8 (n, k / 32): e8m0
    P.weight_global_scale  float32  (1,)  nvfp4 only: a divisor, w = code * scale / global; engines that fuse linears
                                          take one for all of them, so that it must be the same
    P.input_global_scale   float32  (1,)  the divisor of the inputs' scales, only with quantized inputs

Symmetric files have no zero points. Codes and zeros are signed in this dialect: an unsigned code u of ours is u -
2^(b-1) here, which is packed as u again. So the packed words are equal.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.cache import CACHES, PER_HEAD, PER_TENSOR
from lowbit.export.engines.engine import Engine
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.format import BLOCKS_ELSEWHERE, Format, ShapeReader, TensorReader, following, reading, require_words
from lowbit.export.microscaling import every_row, one_number, stored_codes, stored_scales, weight_of
from lowbit.export.patterns import Patterns
from lowbit.quant.numbers import E8M0, FP4, FP8, Number, float_of, integer_of
from lowbit.quant.packing import pack, unpack
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import NAMED, PerBlock, PerGroup, PerTensor, Scheme, Side, granularity_of

NAME = "compressed-tensors"
PACKED, PLAIN, FLOAT, MIXED = "pack-quantized", "int-quantized", "float-quantized", "mixed-precision"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
NAIVE = "naive-quantized"  # another name for the layout of `weight` and `weight_scale`
GLOBAL, INPUT_GLOBAL = "weight_global_scale", "input_global_scale"
GROUPING = "weight_g_idx"
SUFFIXES = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight", "input_scale"),
    *(GLOBAL, INPUT_GLOBAL, GROUPING),
)
SCALE_TYPES = {FP8: "torch.float8_e4m3fn", E8M0: "torch.uint8"}
CACHE_STRATEGIES = {PER_TENSOR: "tensor", PER_HEAD: "attn_head"}
# The quantized inputs that a group may declare.
KNOWN_INPUTS = {scheme.inputs: None for scheme in NAMED.values() if scheme.inputs}


def layout_of(scheme: Scheme) -> str:
    """The name of the layout for a scheme."""
    side = scheme.weights
    if side.number.is_integer:
        return PACKED if scheme.inputs is None or scheme.inputs.number == FP8 else PLAIN
    if side.scales is None:
        return FLOAT
    return NVFP4 if side.parent else MXFP4 if side.number == FP4 else MXFP8


def _read_plain(name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
    codes, scales = tensor(f"{name}.weight"), tensor(f"{name}.weight_scale")
    input_scale = _one(name, "input_scale", tensor) if scheme.static_inputs else None
    return weight_of(codes, every_row(codes, scales), scheme, input_scale)


def _read_fp4(name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
    codes, scales = tensor(f"{name}.weight_packed"), tensor(f"{name}.weight_scale")
    input_scale = _one(name, INPUT_GLOBAL, tensor) if scheme.static_inputs else None
    divisor = _one(name, GLOBAL, tensor) if scheme.weights.parent else None
    return weight_of(codes, scales, scheme, input_scale, divisor)


def _one(name: str, suffix: str, tensor: TensorReader) -> Tensor:
    return one_number(tensor(f"{name}.{suffix}"), suffix)


def _read_packed(name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
    packed, scales = tensor(f"{name}.weight_packed"), tensor(f"{name}.weight_scale")
    n, k = _declared_shape(name, tensor)
    require_words(packed, "weight_packed", (n, None))
    codes, zeros = unpack(packed, scheme.bits, k, scheme.number.bias), None
    if not scheme.symmetric:
        words = tensor(f"{name}.weight_zero_point")
        require_words(words, "weight_zero_point", (None, scheme.groups(k)))
        zeros = unpack(words.T.contiguous(), scheme.bits, n).T.to(torch.int32)
    return QTensor(codes, scales, zeros, scheme)


READERS = {PACKED: _read_packed, NVFP4: _read_fp4, MXFP4: _read_fp4}


def _written_plain(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The file's tensors of a linear whose codes are not packed into 32-bit words."""
    inputs = INPUT_GLOBAL if weight.scheme.weights.parent else "input_scale"
    tensors = {
        "weight_packed" if weight.scheme.number == FP4 else "weight": stored_codes(weight),
        "weight_scale": stored_scales(weight),
        GLOBAL: weight.divisor,
        inputs: weight.input_scale,
    }
    ones = (GLOBAL, inputs)
    return {
        f"{name}.{key}": value.reshape(1) if key in ones else value
        for key, value in tensors.items()
        if value is not None
    }


def _declared_shape(name: str, tensor: TensorReader) -> tuple[int, int]:
    """weight_shape as two integers. CheckpointError if it is anything else."""
    found = tensor(f"{name}.weight_shape")
    if found.dtype not in (torch.int64, torch.int32) or tuple(found.shape) != (2,):
        raise CheckpointError(f"{name}: weight_shape is {found.dtype} {list(found.shape)}; int64, n and k, fits")
    return int(found[0]), int(found[1])


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    return _side_args(scheme.weights, False) | _scale_args(scheme.weights)


def _input_args(inputs: Side) -> dict[str, Any]:
    return _side_args(inputs, "local" if inputs.parent else not inputs.static)


def _written_inputs(inputs: Side) -> dict[str, Any]:
    return _input_args(inputs) | _scale_args(inputs)


def _side_args(side: Side, dynamic: bool | str) -> dict[str, Any]:
    """Number and strategy of a side."""
    number, more = side.number, dict[str, Any]()
    args = {"num_bits": number.bits, "type": "int" if number.is_integer else "float", "symmetric": number.signed}
    strategy = str(side.granularity)
    match side.granularity:
        case PerGroup(size):
            strategy, more = "tensor_group" if side.parent else "group", {"group_size": size}
        case PerBlock(rows, columns):
            strategy, more = "block", {"block_structure": [rows, columns]}
    return args | {"strategy": strategy, "dynamic": dynamic} | more


def _scale_args(side: Side) -> dict[str, Any]:
    """The number type of scales of few bits."""
    return {} if side.scales is None else dict.fromkeys(("scale_dtype", "zp_dtype"), SCALE_TYPES[side.scales])


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
        targets += (
            [rf"re:.*\.\d+\.{re.escape(role)}$"] if whole else [_outside_pattern(name, schemes) for name in inside]
        )
    return targets


def _outside(names: Iterable[str], schemes: Iterable[str]) -> list[str]:
    """Target patterns for linears outside the blocks: engines do not count a head among those of class Linear."""
    return [_outside_pattern(name, schemes) for name in names if _role(name) == name]


def _outside_pattern(name: str, schemes: Iterable[str]) -> str:
    """A pattern for a linear outside the blocks under every prefix, if no other's name ends like it; else its name."""
    leaf = name.rpartition(".")[2]
    alone = _role(name) == name and sum(other.endswith(leaf) for other in schemes) == 1
    return rf"re:.*{re.escape(leaf)}$" if alone else name


def _role(name: str) -> str:
    """The role of a linear: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj`, the name after the last
    number."""
    return re.split(r"\.\d+\.", name)[-1]


def _group_scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    """The scheme of a config group. ValueError for a group that no scheme or layout of ours matches."""
    weights, layout = group["weights"], group.get("format") or config.get("format")
    if weights.get("dynamic") or group.get("output_activations"):
        raise ValueError("only static weights with unquantized outputs are supported")
    if weights.get("strategy") not in (None, "group", "channel", "tensor", "tensor_group", "block"):
        raise ValueError(f"weights with strategy {weights['strategy']!r} are not supported")
    scheme = Scheme(_weights_of(weights), _inputs_of(group.get("input_activations")))
    naive = layout == NAIVE and layout_of(scheme) in (PLAIN, FLOAT)
    if layout not in (None, MIXED, layout_of(scheme)) and not naive:
        raise ValueError(f"{scheme} stored as {layout!r}; it is read as {layout_of(scheme)!r}")
    return scheme


def _weights_of(args: Mapping[str, Any]) -> Side:
    """The side of a group's weights. ValueError if there is none like that."""
    number = _number_of(args)
    if args.get("strategy") == "block":
        rows, columns = args["block_structure"]
        return Side(number, PerBlock(rows, columns))
    size = args.get("group_size") or -1
    if number.is_integer or size == -1:
        return Side(number, granularity_of(size))
    parent = args.get("strategy") == "tensor_group"
    side = Side(number, PerGroup(size), FP8 if parent else E8M0, parent)
    if side not in {scheme.weights for scheme in NAMED.values()}:
        raise ValueError(f"{number.name} in groups of {size} with strategy {args.get('strategy')!r} is not supported")
    return side


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
    for inputs in KNOWN_INPUTS:
        if all(args.get(key) == value for key, value in _input_args(inputs).items()):
            return inputs
    raise ValueError(f"inputs quantized as {dict(args)}: only those of int8-a8, fp8, fp8-block, nvfp4, mxfp4 and mxfp8")


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
    holds_head = True
    by_rows = True
    grouping = GROUPING
    caches = CACHES
    loading = (
        "The files follow the compressed-tensors layout. vLLM and SGLang load the directory as it is; transformers "
        "does with the package `compressed-tensors` installed."
    )

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why this layout cannot hold a scheme, or None."""
        if scheme.weights.blocks:
            return BLOCKS_ELSEWHERE
        if not scheme.symmetric and scheme.bits != 4:
            return (
                f"asymmetric {scheme.bits}-bit weights have no kernel in the engines that read compressed-tensors; "
                "use --sym"
            )
        return None

    def caveat(self, scheme: Scheme) -> str | None:
        """A warning about loading the scheme in other programs, or None."""
        if scheme.symmetric:
            return None
        return (
            "transformers 5.23 with compressed-tensors 0.20 does not load asymmetric weights unless told "
            "CompressedTensorsConfig(dequantize=True); vLLM does"
        )

    def reason_in(self, engine: Engine, scheme: Scheme) -> str | None:
        """The reason why an engine cannot load weights of a scheme, or None."""
        if engine is TRANSFORMERS and not scheme.symmetric:
            return "with compressed-tensors 0.20 it loads asymmetric weights only with dequantize=True"
        return None

    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`."""
        if layout_of(weight.scheme) != PACKED:
            return _written_plain(name, weight)
        bits, bias = weight.scheme.bits, weight.scheme.number.bias
        tensors = {
            f"{name}.weight_packed": pack(weight.codes, bits, bias),
            f"{name}.weight_scale": weight.scales,
            f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zeros is not None:
            tensors[f"{name}.weight_zero_point"] = pack(weight.zeros.T, bits, bias).T.contiguous()
        return tensors

    def divisor(self, name: str, tensor: TensorReader) -> float | None:
        """The global scale."""
        return float(_one(name, GLOBAL, tensor))

    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`; `tensor` reads a tensor of the file by its name.

        CheckpointError if packed words, scales and shape contradict each other or the scheme.
        """
        with reading(name):
            return READERS.get(layout_of(scheme), _read_plain)(name, tensor, scheme)

    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`."""
        if layout_of(scheme) == PACKED:
            return _declared_shape(name, tensor)
        packed = scheme.number == FP4
        sizes = shapes(f"{name}.{'weight_packed' if packed else 'weight'}")
        if len(sizes) != 2:
            raise CheckpointError(f"{name}: its shape is {sizes}, not outputs and inputs")
        return sizes[0], sizes[1] * (2 if packed else 1)

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
            targets = ["Linear", *_outside(names, schemes)] if len(by_scheme) == 1 else _targets(names, schemes)
            groups[f"group_{i}"] = {
                "targets": targets,
                "weights": _weight_args(scheme),
                "input_activations": None if scheme.inputs is None else _written_inputs(scheme.inputs),
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

    def with_cache(self, config: Mapping[str, Any], cache: str) -> dict[str, Any]:
        """A quantization_config with a key-value cache declared."""
        side = _side_args(Side(FP8, PerTensor()), dynamic=False)
        return dict(config) | {"kv_cache_scheme": side | {"strategy": CACHE_STRATEGIES[cache]}}

    def cache_of(self, config: Mapping[str, Any]) -> str | None:
        """The key-value cache that a quantization_config declares, or None. CheckpointError for another number."""
        with following("; of key-value caches 8-bit floats with strategy tensor or attn_head are supported"):
            declared = config.get("kv_cache_scheme")
            if not declared:
                return None
            if _number_of(declared) != FP8 or declared.get("dynamic"):
                raise ValueError(f"kv_cache_scheme {declared}")
            return {strategy: name for name, strategy in CACHE_STRATEGIES.items()}[declared["strategy"]]

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme that a quantization_config gives each quantized linear of `names`.

        CheckpointError if no group targets a linear, or if a group is malformed or not supported.
        """
        with following():
            targets = _Targets(
                (target, _group_scheme(group, config))
                for group in config["config_groups"].values()
                for target in group["targets"]
            )
            return {name: targets.scheme_of(name) for name in names}


COMPRESSED_TENSORS = CompressedTensors()
