"""The two weights of a vocabulary's size under quantization: the output head and the input embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.models.skeleton import Skeleton, tied_weights
from lowbit.quant import numerics
from lowbit.quant.algos.clip import group_moments, round_plainly
from lowbit.quant.algos.few import round_in_ranges
from lowbit.quant.algos.gptq import gptq
from lowbit.quant.qtensor import QTensor
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme, parse_scheme
from lowbit.quant.stats import Stats, output_energy

ROWS = 16384  # rounded at a time: a head of 150,000 rows needs a tenth of its size besides itself


@dataclass(frozen=True)
class VocabularyWeight:
    """The weight of the head or of the embeddings, to be rounded.

    name    its name as a linear in the file
    tensor  the file's tensor that holds its weight: the embeddings' if they are tied
    n, k    vocabulary and hidden size
    tied    True if the checkpoint is untied by this: head and embeddings become two tensors
    asked   the requested scheme, which may not divide the shape
    """

    name: str
    tensor: str
    scheme: Scheme
    n: int
    k: int
    tied: bool
    asked: Scheme

    @property
    def fallback(self) -> str:
        """The end of a sentence that says why it has another scheme than the requested one; empty if it has not."""
        if self.scheme == self.asked:
            return ""
        return f" in place of {self.asked}: {self.asked.reason_against_shape(self.n, self.k)}"


def vocabulary_of(
    skeleton: Skeleton, recipe: Recipe, ties_head: bool
) -> tuple[VocabularyWeight | None, VocabularyWeight | None]:
    """The head and the embeddings that `recipe` has quantized, each of them or None.

    ties_head  True if a format has one quantized tensor for both, in models that tie them: then it is the embeddings,
               in the head's scheme if the recipe has one
    """
    head, embeddings = head_of(skeleton, recipe), embeddings_of(skeleton, recipe)
    if not ties_head or not any(weight is not None and weight.tied for weight in (head, embeddings)):
        return head, embeddings
    one = embeddings_of(skeleton, replace(recipe, embeddings=recipe.head or recipe.embeddings))
    assert one is not None
    return None, replace(one, tied=False)


def head_of(skeleton: Skeleton, recipe: Recipe) -> VocabularyWeight | None:
    """The head that `recipe` has quantized, or None. CheckpointError if the model's does not fit the scheme."""
    module, path = _module_and_name(skeleton, skeleton.model.get_output_embeddings())
    if recipe.head is None:
        return None
    if module is None or path is None:
        raise CheckpointError(f"{skeleton.source.directory}: the model has no head to quantize; leave out --head")
    parameter, files = f"{path}.weight", _files(skeleton)
    origin = tied_weights(skeleton.model).get(parameter)
    tensor = files.get(parameter if origin is None else origin) or files.get(parameter)
    scheme = _fitting(skeleton, "head", recipe.head, module.weight)
    if tensor is None:
        raise CheckpointError(f"{skeleton.source.directory}: no tensor of its files is its head; leave out --head")
    n, k = module.weight.shape
    return VocabularyWeight(head_name(skeleton), tensor, scheme, n, k, origin is not None, parse_scheme(recipe.head))


def embeddings_of(skeleton: Skeleton, recipe: Recipe) -> VocabularyWeight | None:
    """The input embeddings that `recipe` has quantized, or None. CheckpointError if they do not fit the scheme."""
    if recipe.embeddings is None:
        return None
    module, path = _module_and_name(skeleton, skeleton.model.get_input_embeddings())
    tensor = _files(skeleton).get(f"{path}.weight")
    if not isinstance(module, nn.Embedding) or tensor is None:
        raise CheckpointError(
            f"{skeleton.source.directory}: the model has no table of embeddings to quantize; leave out --embeddings"
        )
    scheme = _fitting(skeleton, "table of embeddings", recipe.embeddings, module.weight)
    tied = f"{path}.weight" in tied_weights(skeleton.model).values()
    n, k = module.weight.shape
    return VocabularyWeight(tensor.removesuffix(".weight"), tensor, scheme, n, k, tied, parse_scheme(recipe.embeddings))


def head_name(skeleton: Skeleton) -> str:
    """The head's name as a linear in the file, also if it has no tensor of its own."""
    parameter = f"{_module_and_name(skeleton, skeleton.model.get_output_embeddings())[1]}.weight"
    return _files(skeleton).get(parameter, parameter).removesuffix(".weight")


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (config.json) of a model whose head and embeddings are two tensors."""
    inner = config.get("text_config")
    more = {"text_config": inner | {"tie_word_embeddings": False}} if isinstance(inner, dict) else {}
    return dict(config) | {"tie_word_embeddings": False} | more


def rounded(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, stats: Stats | None = None, compensate: bool = False
) -> QTensor:
    """`weight` (n, k) rounded to `scheme`, ROWS at a time.

    stats       of the inputs; None to round for the weight itself
    compensate  True to round by GPTQ, which needs `stats`; False to the nearest codes of searched ranges
    """
    plain, moment = scheme.weights_only, None if stats is None else stats.second_moment()
    divisor = numerics.divisor_of(weight.abs().amax().float(), plain.weights) if plain.weights.parent else None

    def one(rows: Tensor) -> QTensor:
        if moment is not None and compensate:
            return gptq(rows, moment, plain, scale_dtype, divisor=divisor).weight
        if moment is None:
            return round_plainly(rows, plain, scale_dtype, divisor)
        return round_in_ranges(rows, plain, scale_dtype, group_moments(moment, plain), divisor)

    parts = [one(rows) for rows in weight.split(ROWS)]
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    zeros = [part.zeros for part in parts if part.zeros is not None]
    whole = replace(parts[0], codes=codes, scales=scales, zeros=torch.cat(zeros) if zeros else None)
    return replace(whole, scheme=scheme)


def row_of(weight: QTensor, original: Tensor, stats: Stats | None) -> dict[str, Any]:
    """The report's row: scheme, shape, relative error of the weight and, with `stats`, squared, of its output."""
    error = weight.dequantize() - original
    row: dict[str, Any] = {
        "scheme": str(weight.scheme),
        "shape": list(weight.shape),
        "weight_error": float(error.norm() / original.norm().clamp(min=1e-30)),
    }
    if stats is not None:
        moment = stats.second_moment()
        lost, whole = output_energy(error, moment), output_energy(original, moment)
        row |= {"tokens": stats.tokens, "output_error": lost / max(whole, 1e-30)}
    return row


def _module_and_name(skeleton: Skeleton, module: Any) -> tuple[Any, str | None]:
    return module, next((name for name, each in skeleton.model.named_modules() if each is module), None)


def _files(skeleton: Skeleton) -> dict[str, str]:
    """The file's tensor of each parameter outside the blocks."""
    return {place.parameter: name for name, place in skeleton.others.items() if place.conversion is None}


def _fitting(skeleton: Skeleton, what: str, text: str, weight: Tensor) -> Scheme:
    """The scheme `text`, or its first fallback, for a weight. CheckpointError if none fits its shape."""
    n, k = weight.shape
    scheme = parse_scheme(text).fitting([(n, k)])
    if scheme is None:
        raise CheckpointError(f"{skeleton.source.directory}: its {what} of {n} x {k} cannot have the scheme {text}")
    return scheme
