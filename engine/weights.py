"""A checkpoint's tensors in the decoder's layout: rows reordered, quantized weights packed.

The decoder has a fixed layout: rows of q, k and v stacked, and rotary pairs half a head apart. Other layouts of a
family's files (interleaved heads, adjacent pairs, partly rotated heads) are converted here by reordering rows.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture, HeadSizes, LatentSizes, Mixture, MixtureNames, Names, Rope
from lowbit.engine.cache import CacheKind
from lowbit.engine.feed_forward import Router
from lowbit.engine.latent import Latent
from lowbit.engine.layers import Block, TokenInputs, build_block
from lowbit.engine.products import Norm, Product
from lowbit.errors import CheckpointError, UsageError
from lowbit.export.checkpoint import Checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.export.tensorfile import Buffer, read_tensor
from lowbit.quant.kernels.joined import len_of, moved, shared_inputs, stacked
from lowbit.quant.kernels.kv_cache import CACHE_NUMBERS, FP8_CACHE, INT8_CACHE, SAME, CacheNumber, reason_against_width
from lowbit.quant.kernels.packed import TILE_ROWS, has_kernel, reason_against_kernel
from lowbit.quant.kernels.stack import StackedLinear, load_stack
from lowbit.quant.kernels.weight import Linear, RoundedInputs, inputs_of, load_weight
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import parse_scheme

CACHES = ("auto", *CACHE_NUMBERS)  # key-value caches; "auto": what the checkpoint declares

MOST_PINNED = 512 << 20  # bytes; larger tensors are read to memory of their own


@dataclass(frozen=True)
class Weights:
    """A decoder's weights.

    embedding  (vocabulary, hidden); positions (max_positions, hidden) if learned
    head       the output head, with the norm before it
    expanded   scheme -> number of linears of it that have no kernel and were dequantized
    cache      the keys and values that the layers write
    unused_cache  the key-value cache that the checkpoint has scales for ("fp8") if another one is written, or None
    token_inputs  the inputs that layers have of their own for each token, or None
    """

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[Block, ...]
    head: Product
    expanded: Mapping[str, int] = field(default_factory=dict)
    cache: CacheKind = field(default_factory=CacheKind)
    unused_cache: str | None = None
    token_inputs: TokenInputs | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def step_nbytes(self, distinct: Mapping[int, int]) -> int:
        """Bytes that a decode step reads: the weights of all products and of the head.

        distinct  the number of experts that it reads in each layer that has some
        """
        layers = sum(layer.step_nbytes(distinct.get(index, 0)) for index, layer in enumerate(self.layers))
        inputs = 0 if self.token_inputs is None else self.token_inputs.projection.linear.nbytes
        return layers + inputs + self.head.linear.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all products and of the head."""
        return self.step_nbytes({index: layer.feed_forward.experts_count for index, layer in enumerate(self.layers)})


@dataclass(frozen=True)
class Placed(Checkpoint):
    """A checkpoint whose tensors are read to a device, so that codes are unpacked there.

    pinned  host memory that a GPU copies from, for one tensor at a time; None for a CPU
    """

    device: torch.device
    pinned: Buffer | None

    def read(self, name: str) -> Tensor:
        """The tensor `name`, as stored, on the device."""
        return read_tensor(self._entry(name), self.pinned).to(self.device)


def pinned_for(checkpoint: Checkpoint, device: torch.device) -> Buffer | None:
    """Pinned memory for the largest tensor, up to MOST_PINNED; None for a CPU.

    Without it the host writes each tensor to new pages and the driver copies it once more: 1.7 of the 3.4 s to load
    Llama-2-7B in 4 bits.
    """
    if device.type == "cpu":
        return None
    largest = max((entry.nbytes for entry in checkpoint.entries.values()), default=0)
    return Buffer(torch.empty(min(largest, MOST_PINNED), dtype=torch.uint8, pin_memory=True))


@dataclass(frozen=True)
class Settings:
    """Settings for loading weights.

    dtype         of activations and dense weights; with float32 all weights are dense, since packed ones need half
                  precision
    cache         one of CACHES
    head          "dense", or the scheme to round the head to ("int8", "int4-g128")
    linears       the same for all other dense linears
    """

    device: torch.device
    dtype: torch.dtype
    cache: str = "auto"
    head: str = "dense"
    linears: str = "dense"


def load_weights(checkpoint: Checkpoint, names: Names, architecture: Architecture, settings: Settings) -> Weights:
    """The weights of `checkpoint`. CheckpointError if a tensor is missing, left over, or has a wrong shape."""
    reader = CheckpointReader(checkpoint, names, architecture, settings)
    a = architecture
    embedding = reader.tensor(f"{names.embedding}.weight", (a.vocabulary, a.hidden))
    positions = None
    if names.positions is not None:
        positions = reader.tensor(f"{names.positions}.weight", (a.max_positions, a.hidden))
    number, declared = reader.cache_number(), reader.tensors.cache
    layers = tuple(build_block(LayerParts(reader, i), a, i, number == SAME) for i in range(len(a.layers)))
    head = Product(reader.head(embedding), reader.norm(names.norm), float32_out=True)
    kind = CacheKind(number, reader.cache_scales() if number.scales == "head" else ())
    unused = None if number == FP8_CACHE else declared
    inputs = reader.token_inputs() if a.token_inputs else None
    weights = Weights(embedding, positions, layers, head, reader.expanded, kind, unused, inputs)
    reader.refuse_leftovers()
    return weights


def head_order(head_dim: int, rope: Rope) -> Tensor:
    """For each place in our head: the file's input there. Pair j goes to places j and j + head_dim / 2."""
    pairs, half = len(rope.frequencies), head_dim // 2
    first = torch.arange(pairs)
    low, high = (2 * first, 2 * first + 1) if rope.adjacent else (first, first + pairs)
    rest = torch.arange(2 * pairs, head_dim)
    return torch.cat([low, rest[: half - pairs], high, rest[half - pairs :]])


def qkv_order(sizes: HeadSizes, rope: Rope, per_head: bool) -> Tensor:
    """For each of our rows of q, k and v: the file's row there."""
    d = sizes.head_dim
    heads = torch.arange(sizes.heads + 2 * sizes.made)
    if per_head:  # q, k, v of head 0, then of head 1: 3 h + part
        heads = torch.arange(3 * sizes.heads).view(sizes.heads, 3).T.flatten()
    order = head_order(d, rope)
    turned, v = heads[: sizes.heads + sizes.made], heads[sizes.heads + sizes.made :]
    rows = torch.cat([turned.unsqueeze(1) * d + order, v.unsqueeze(1) * d + torch.arange(d)])
    return rows.flatten()


class CheckpointReader:
    """Reads a checkpoint's tensors by the family's names, and records which were read."""

    def __init__(self, checkpoint: Checkpoint, names: Names, architecture: Architecture, settings: Settings) -> None:
        pinned = pinned_for(checkpoint, settings.device)
        placed = Placed(**vars(checkpoint), device=settings.device, pinned=pinned)
        self.tensors = LogicalTensors(placed)
        self.names, self.architecture, self.settings = names, architecture, settings
        self.known = frozenset(self.tensors.names)
        self.left = set(self.known)
        self.directory = checkpoint.directory
        self.expanded: Counter[str] = Counter()

    def found(self, name: str) -> str | None:
        """The file's name of a tensor: `name`, or without its first part, as in files of base models."""
        return next((each for each in (name, name.partition(".")[2]) if each in self.known), None)

    def require(self, name: str) -> str:
        """The file's name of a required tensor. CheckpointError if it is missing."""
        found = self.found(name)
        if found is None:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is in no file, and {self.architecture.family} needs it: the "
                "download is incomplete, or config.json belongs to another model"
            )
        self.left.discard(found)
        return found

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in the activations' dtype. CheckpointError for a wrong shape."""
        found = self.require(name)
        if self.tensors.is_quantized(found):
            self.expanded[f"{self.tensors.schemes[found.removesuffix('.weight')]} in a lookup"] += 1
        return self.shaped(found, self.tensors.read(found), shape).to(self.settings.dtype)

    def shaped(self, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`value` if it has this shape. CheckpointError otherwise."""
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"{self.directory}: {name} has shape {list(value.shape)}, config.json asks for {list(shape)}"
            )
        return value

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """An optional tensor, or None."""
        return None if self.found(name) is None else self.tensor(name, shape)

    def bias(self, name: str, n: int, biased: bool | None) -> Tensor | None:
        """A linear's bias (n), if the file has it and the configuration does not exclude it."""
        return None if biased is False else self.optional(name, (n,))

    def biases(self, parts: Sequence[str], matrices: list[QTensor | Tensor], biased: bool | None) -> Tensor | None:
        """The biases of linears, stacked like their rows; None if none has one."""
        found = [self.bias(f"{part}.bias", len_of(m), biased) for part, m in zip(parts, matrices, strict=True)]
        if all(each is None for each in found):
            return None
        absent = [torch.zeros(len_of(m), dtype=self.settings.dtype, device=self.settings.device) for m in matrices]
        return torch.cat([absent[i] if each is None else each for i, each in enumerate(found)])

    def norm(self, name: str) -> Norm:
        """The norm `name` of hidden states."""
        a = self.architecture
        weight = self.tensor(f"{name}.weight", (a.hidden,))
        bias = self.optional(f"{name}.bias", (a.hidden,)) if a.norm == "layer" else None
        return Norm(a.norm, weight + a.norm_offset, bias, a.norm_eps)

    def head_norm(self, name: str, rope: Rope, width: int, head_dim: int) -> Tensor:
        """The weight (width) of the norm on heads of q or k, or on several heads together, reordered like their
        rows."""
        weight = self.tensor(f"{name}.weight", (width,)) + self.architecture.norm_offset
        return weight.unflatten(0, (-1, head_dim))[:, head_order(head_dim, rope).to(weight.device)].flatten()

    def token_inputs(self) -> TokenInputs:
        """The inputs that layers have of their own for each token."""
        a, names, sizes = self.architecture, self.names.token_inputs, self.architecture.token_inputs
        assert sizes is not None
        count, width = len(a.layers), sizes.width
        table = self.tensor(f"{names.embedding}.weight", (sizes.vocabulary, count * width))
        projection = Product(self.linear((names.projection,), count * width, a.hidden, TILE_ROWS))
        weight = self.tensor(f"{names.norm}.weight", (width,)) / math.sqrt(2)
        # the projection is divided by sqrt(hidden): its norm's eps is multiplied instead
        return TokenInputs(table, projection, Norm(a.norm, weight, None, a.norm_eps * a.hidden))

    def matrix(self, linear: str) -> QTensor | Tensor:
        """The weight of a linear (n, k): quantized as in the file, or dense in the activations' dtype."""
        found = self.require(f"{linear}.weight")
        if found.removesuffix(".weight") in self.tensors.schemes:
            return self.packed(found.removesuffix(".weight"))
        value = self.tensors.read(found).to(self.settings.dtype)
        value = value.T if self.names.transposed else value
        if self.settings.linears == "dense":
            return value
        return round_to_nearest(value, parse_scheme(self.settings.linears), self.settings.dtype)

    def packed(self, linear: str) -> QTensor:
        """The quantized weight of a linear of the file."""
        weight = self.tensors.qtensor(linear)
        if reason_against_kernel(weight):
            why = " in act-order" if weight.order is not None else ""
            self.expanded[f"{weight.scheme}{why or ' with scales far apart' * has_kernel(weight.scheme)}"] += 1
        return weight

    def linear(
        self,
        parts: tuple[str, ...],
        n: int,
        k: int,
        pair_block: int,
        rows: Tensor | None = None,
        biased: bool | None = None,
    ) -> Linear:
        """The linears `parts` stacked to shape (n, k), with row i of the result taken from row `rows[i]`.

        biased  False: a bias in the file counts as left over
        """
        dtype = self.settings.dtype
        matrices = [self.matrix(part) for part in parts]
        weight, inputs = stacked(matrices, dtype), shared_inputs(matrices)
        self.shaped(" + ".join(parts), weight if isinstance(weight, Tensor) else weight.codes, (n, k))
        bias = self.biases(parts, matrices, biased)
        if rows is not None:
            rows = rows.to(self.settings.device)
            weight = moved(weight, rows, dtype)
            bias = None if bias is None else bias[rows]
        return Linear(load_weight(weight, dtype, pair_block), bias, inputs)

    def stack(
        self, names: tuple[str, ...], sizes: tuple[int, int, int], paired: bool, biased: bool | None
    ) -> StackedLinear:
        """The linears `names` of all experts, each expert's stacked to (n, k), as one weight.

        names   with {} for the expert's number; the file may have one tensor of all experts under the name without it
        sizes   experts, n, k
        paired  True for gate and up: two names, or one whose rows are gate and up by turns
        """
        (experts, n, k), dtype = sizes, self.settings.dtype
        whole = self.found(names[0].replace(".{}", "")) if len(names) == 1 else None
        parts, matrices = self.single_experts(names, experts) if whole is None else self.sliced(whole, experts)
        for part, matrix in zip(parts, matrices, strict=True):
            self.shaped(part, matrix if isinstance(matrix, Tensor) else matrix.codes, (n // len(names), k))
        if whole is not None:
            bias = self.optional(f"{whole}_bias", (experts, n))
        else:
            bias = self.biases(parts, matrices, biased)
        weight = stacked(matrices, dtype)
        if paired and len(names) == 1:
            order = torch.arange(n, device=self.settings.device).view(-1, 2).T.flatten()
            rows = torch.arange(experts, device=self.settings.device).unsqueeze(1) * n + order
            weight = moved(weight, rows.flatten(), dtype)
            bias = None if bias is None else bias.view(experts, n)[:, order]
        bias = None if bias is None else bias.view(experts, n).contiguous()
        return StackedLinear(load_stack(weight, experts, dtype, paired), bias, shared_inputs(matrices))

    def single_experts(self, names: tuple[str, ...], experts: int) -> tuple[list[str], list[QTensor | Tensor]]:
        """The linears of all experts, each under a name of its own."""
        parts, matrices = [], []
        for expert in range(experts):
            for name in names:
                parts.append(name.format(expert))
                matrices.append(self.matrix(parts[-1]))
        return parts, matrices

    def sliced(self, whole: str, experts: int) -> tuple[list[str], list[QTensor | Tensor]]:
        """The linears of all experts in the tensor `whole`, which is (experts, k, n) if it is dense."""
        self.left.discard(whole)
        members = self.tensors.stacks.get(whole)
        found = self.tensors.read(whole).to(self.settings.dtype) if members is None else None
        count = len(members) if members is not None else 0 if found is None or found.ndim != 3 else len(found)
        if count != experts:
            raise CheckpointError(f"{self.directory}: {whole} has {count} experts, config.json asks for {experts}")
        parts = [f"{whole}[{expert}]" for expert in range(experts)]
        if members is not None:
            return parts, [self.packed(member) for member in members]
        assert found is not None
        return parts, list(found.transpose(1, 2))

    def all_experts(self, whole: str, sizes: tuple[int, int, int], paired: bool) -> StackedLinear:
        """The linears of all experts in the tensor `whole` (experts, n, k)."""
        found, dtype = self.require(whole), self.settings.dtype
        value = self.shaped(found, self.tensors.read(found), sizes).to(dtype).flatten(0, 1)
        if self.settings.linears == "dense":
            return StackedLinear(load_stack(value, sizes[0], dtype, paired))
        weight = round_to_nearest(value, parse_scheme(self.settings.linears), dtype)
        return StackedLinear(load_stack(weight, sizes[0], dtype, paired), None, inputs_of(weight))

    def router(self, names: MixtureNames, prefix: str, mixture: Mixture) -> Router:
        """The router of the layer whose tensors' names start with `prefix`."""
        name, experts, a = prefix + names.router, mixture.experts, self.architecture
        weight = self.finite(f"{name}.weight", self.tensor(f"{name}.weight", (experts, a.hidden)))
        correction, factors = (
            None if part is None else self.exact(prefix + part, (experts,))
            for part in (names.correction, names.factors)
        )
        norm = None
        if names.router_scale is not None:
            scale = self.exact(prefix + names.router_scale, (a.hidden,)) * a.hidden**-0.5
            norm = Norm("rms", scale.to(self.settings.dtype), None, a.norm_eps)
        bias = self.optional(f"{name}.bias", (experts,))
        bias = None if bias is None else self.finite(f"{name}.bias", bias)
        return Router(weight.contiguous(), bias, correction, mixture.rule, factors, norm)

    def exact(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a router or a layer's factor in float32."""
        found = self.require(name)
        return self.finite(found, self.shaped(found, self.tensors.read(found), shape).float())

    def finite(self, name: str, value: Tensor) -> Tensor:
        """`value`. CheckpointError if numbers of it are none: no expert would be chosen by them."""
        if not value.isfinite().all():
            raise CheckpointError(
                f"{self.directory}: {name} holds numbers that are NaN or infinite in {value.dtype}: they choose no "
                "expert, and are no factor; download the file again, or load with another dtype"
            )
        return value

    def head(self, embedding: Tensor) -> Linear:
        """The head: its own weight, or the embedding if tied; rounded if the settings say so.

        As in transformers, a head that the file has is used, whatever config.json says about tying.
        """
        a, settings = self.architecture, self.settings
        name = self.names.head if self.found(f"{self.names.head}.weight") else "lm_head"
        weight: QTensor | Tensor = embedding
        if not a.tied or self.found(f"{name}.weight"):
            weight = self.matrix_of_head(name)
        if settings.head != "dense" and isinstance(weight, Tensor):
            weight = round_to_nearest(weight, parse_scheme(settings.head), settings.dtype)
        bias = self.bias(f"{name}.bias", a.vocabulary, a.head_bias)
        return Linear(load_weight(weight, settings.dtype), bias, inputs_of(weight))

    def matrix_of_head(self, name: str) -> QTensor | Tensor:
        """The head's weight, (vocabulary, hidden) in all families."""
        found = self.require(f"{name}.weight")
        if name in self.tensors.schemes:
            return self.packed(name)
        shape = (self.architecture.vocabulary, self.architecture.hidden)
        return self.shaped(found, self.tensors.read(found), shape).to(self.settings.dtype)

    def cache_number(self) -> CacheNumber:
        """The number type of keys and values that the settings ask for. UsageError if it does not fit the model."""
        wanted, declared = self.settings.cache, self.tensors.cache
        number = SAME if declared is None else FP8_CACHE
        if wanted != "auto":
            number = CACHE_NUMBERS[wanted]
        widths = {self.architecture.heads_of(index).head_dim for index in range(len(self.architecture.layers))}
        reason = next((why for width in sorted(widths) if (why := reason_against_width(number, width))), None)
        if number.scales == "head" and declared is None:
            reason = f"{self.directory} has no scales for it: quantize with --kv-cache {wanted}"
        if self.architecture.latent is not None and number not in (SAME, INT8_CACHE):
            reason = f"compressed rows of latent attention are not stored in {number.name}"
        if reason is not None:
            raise UsageError(f"cache {wanted!r}: {reason}; or use cache='int8'")
        return number

    def cache_scales(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Scales (kv_heads) float32 of each layer's keys and values: 1 if the file has none, as in other engines.

        CheckpointError for other numbers of scales than one or one per head.
        """
        found = self.tensors.cache_scales()

        def scale(attention: str, part: str, heads: int) -> Tensor:
            places = (f"{each}.{part}_scale" for each in (attention, attention.partition(".")[2]))
            values = next((found[each] for each in places if each in found), torch.ones(1)).flatten()
            if len(values) not in (1, heads):
                raise CheckpointError(
                    f"{self.directory}: {attention} has {len(values)} scales of {part} for {heads} heads; one, or one "
                    "per head, is expected"
                )
            return values.to(self.settings.device, torch.float32).expand(heads).contiguous()

        layers = [LayerParts(self, index) for index in range(len(self.architecture.layers))]
        sides = ((layer.attention, layer.sizes.kv_heads) for layer in layers)
        return tuple((scale(attention, "k", heads), scale(attention, "v", heads)) for attention, heads in sides)

    def refuse_leftovers(self) -> None:
        """CheckpointError if the files hold tensors without a place in this architecture."""
        names, count, more = self.names, len(self.architecture.layers), self.architecture.more_layers
        # k and v of layers that read another one's are in some files, and in no model
        unused = (
            names.layer.format(index) + name
            for index, layer in enumerate(self.architecture.layers)
            if layer.source is not None
            for name in (*names.qkv[1:], names.k_norm)
            if name is not None
        )
        others = (*names.others, *unused, *(names.layer.format(index) for index in range(count, count + more)))
        left = sorted(n for n in self.left if not n.endswith(names.ignored) and not n.startswith(others))
        if left:
            raise CheckpointError(
                f"{self.directory}: {len(left)} tensors do not belong to {self.architecture.family} with "
                f"{count} layers, the first {left[0]!r}: config.json belongs to another model"
            )


class LayerParts:
    """The parts of layer `index` of a checkpoint: see layers.Parts."""

    def __init__(self, reader: CheckpointReader, index: int) -> None:
        self.reader, self.names, self.layer = reader, reader.names, reader.architecture.layers[index]
        self.rope, self.sizes = self.layer.rope, reader.architecture.heads_of(index)
        self.prefix = self.names.layer.format(index)

    def linear(self, part: str, n: int, k: int, pair_block: int = TILE_ROWS) -> Linear:
        """A linear, or several stacked; rows of q, k and v in the decoder's order."""
        a, names = self.reader.architecture, self.linears_of(part)
        rows = qkv_order(self.sizes, self.rope, self.names.per_head) if part == "qkv" else None
        biased = a.attention_bias if part in ("qkv", "o") else a.mlp_bias
        return self.reader.linear(names, n, k, pair_block, rows, biased)

    def linears_of(self, part: str) -> tuple[str, ...]:
        """The linears stacked in a part. Of a layer that reads another one's keys and values q alone; where v is k, k
        twice."""
        found = self.names.of(part)
        assert found is not None
        names = tuple(self.prefix + name for name in ((found,) if isinstance(found, str) else found))
        if part == "qkv" and not self.sizes.made:
            return names[:1]
        return (*names[:2], names[1]) if part == "qkv" and self.layer.v_is_k else names

    @property
    def attention(self) -> str:
        """The module whose linears make keys and values."""
        return self.prefix + self.names.qkv[0].rpartition(".")[0]

    @property
    def mixture(self) -> MixtureNames:
        """The names of a layer with experts."""
        assert self.names.mixture is not None
        return self.names.mixture

    def router(self, mixture: Mixture) -> Router:
        """The router of a layer with experts."""
        return self.reader.router(self.mixture, self.prefix, mixture)

    def stack(self, part: str, mixture: Mixture, n: int, k: int) -> StackedLinear:
        """The linears of all experts."""
        found, whole = ((self.mixture.up, self.mixture.up_whole), (self.mixture.down, self.mixture.down_whole))[
            part != "up"
        ]
        names = tuple(self.prefix + name for name in ((found,) if isinstance(found, str) else found))
        sizes, paired = (mixture.experts, n, k), part == "up"
        if whole is not None and self.reader.found(self.prefix + whole) is not None:
            return self.reader.all_experts(self.prefix + whole, sizes, paired)
        return self.reader.stack(names, sizes, paired, self.reader.architecture.mlp_bias)

    def latent(self) -> tuple[Linear, Latent]:
        """The first product of multi-head latent attention, and the way from its outputs to heads."""
        reader, a, names = self.reader, self.reader.architecture, self.names.latent
        sizes, biased = a.latent, a.attention_bias
        assert sizes is not None
        still, order = a.head_dim - sizes.turned, head_order(sizes.turned, self.rope)
        head = torch.cat([torch.arange(still), still + order])
        rows = (torch.arange(a.heads).unsqueeze(1) * a.head_dim + head).flatten()
        outputs, q, q_norm = sizes.q_outputs(a), None, None
        every = torch.cat([torch.arange(outputs + sizes.kv_rank), outputs + sizes.kv_rank + order])
        if sizes.q_rank:
            q = reader.linear((self.prefix + names.q_b,), len(rows), sizes.q_rank, TILE_ROWS, rows, biased=False)
            q_norm = reader.tensor(f"{self.prefix}{names.q_norm}.weight", (sizes.q_rank,))
        else:
            every[:outputs] = rows
        first = names.q_a if sizes.q_rank else names.q
        parts = (self.prefix + first, self.prefix + names.kv_a)
        qkv = reader.linear(parts, len(every), a.hidden, TILE_ROWS, every, biased)
        kv_norm = reader.tensor(f"{self.prefix}{names.kv_norm}.weight", (sizes.kv_rank,))
        keys, values, inputs = self.key_values(still, sizes)
        return qkv, Latent(q, q_norm, kv_norm, keys, values, inputs, a)

    def key_values(self, still: int, sizes: LatentSizes) -> tuple[Tensor, Tensor, RoundedInputs | None]:
        """The dense weights of k and v of latent attention, and the rounding of their inputs."""
        reader, name = self.reader, self.prefix + self.names.latent.kv_b
        heads, found = reader.architecture.heads, reader.matrix(name)
        weight = found if isinstance(found, Tensor) else found.dequantize(reader.settings.dtype)
        reader.shaped(name, weight, (heads * (still + sizes.v_dim), sizes.kv_rank))
        keys, values = weight.unflatten(0, (heads, -1)).split([still, sizes.v_dim], 1)
        return keys.contiguous(), values.contiguous(), inputs_of(found)

    def sinks(self) -> Tensor | None:
        """The scores that take part in every softmax of attention."""
        name, heads = self.names.sinks, self.reader.architecture.heads
        return None if name is None else self.reader.tensor(self.prefix + name, (heads,))

    def shared_gate(self) -> Tensor | None:
        """The gate of the feed-forward beside the experts."""
        name, hidden = self.mixture.shared_gate, self.reader.architecture.hidden
        return None if name is None else self.reader.tensor(f"{self.prefix}{name}.weight", (1, hidden))

    def norm(self, part: str) -> Norm | None:
        """A norm of hidden states."""
        name = self.names.of(part)
        return None if name is None else self.reader.norm(f"{self.prefix}{name}")

    def factor(self) -> float:
        """The factor of the layer's output."""
        name = self.names.factor
        return 1.0 if name is None else float(self.reader.exact(self.prefix + name, (1,)))

    def head_norm(self, part: str, width: int) -> Tensor | None:
        """The weight of a norm on heads, reordered like their rows."""
        name = self.names.of(part)
        if name is None or not self.reader.architecture.head_norms:
            return None
        return self.reader.head_norm(f"{self.prefix}{name}", self.rope, width, self.sizes.head_dim)
