"""The output embeddings under quantization: where their weight is, and the scheme that a recipe gives them."""

from dataclasses import dataclass

from lowbit.errors import CheckpointError
from lowbit.models.skeleton import Skeleton, tied_weights
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme, parse_scheme


@dataclass(frozen=True)
class Head:
    """A head to be rounded to nearest.

    name    its name as a linear in the file
    tensor  the file's tensor that holds its weight: the embeddings' if they are tied
    n, k    vocabulary and hidden size
    tied    True if the checkpoint is untied by this: the embeddings stay in 16 bits
    """

    name: str
    tensor: str
    scheme: Scheme
    n: int
    k: int
    tied: bool


def head_of(skeleton: Skeleton, recipe: Recipe) -> Head | None:
    """The head that `recipe` has quantized, or None. CheckpointError if the model's does not fit the scheme."""
    if recipe.head is None:
        return None
    module = skeleton.model.get_output_embeddings()
    path = next((name for name, each in skeleton.model.named_modules() if each is module), None)
    if module is None or path is None:
        raise CheckpointError(f"{skeleton.source.directory}: the model has no head to quantize; leave out --head")
    parameter, (n, k) = f"{path}.weight", module.weight.shape
    files = {place.parameter: name for name, place in skeleton.others.items() if place.conversion is None}
    origin = tied_weights(skeleton.model).get(parameter)
    tensor = files.get(parameter if origin is None else origin) or files.get(parameter)
    scheme = parse_scheme(recipe.head).fitting([(n, k)])
    if tensor is None or scheme is None:
        raise CheckpointError(
            f"{skeleton.source.directory}: its head of {n} x {k} cannot have the scheme {recipe.head}"
        )
    name = files.get(parameter, parameter).removesuffix(".weight")
    return Head(name, tensor, scheme, n, k, tied=origin is not None)
