"""Texts that a model writes, and what a drafter learns from them.

The features of a text are those of the steps that wrote it, and so are the model's choices: nothing is read twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.decoder import Decoder
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.passes import SHARED_COUNTS, Reader
from lowbit.engine.request import Request
from lowbit.engine.sampler import features_of
from lowbit.engine.sampling import Sampling
from lowbit.engine.workspace import Workspace

LIKELIEST = 32  # tokens of a distribution that is learned
SHARPENED = 0.6  # temperature of it: a drafter proposes its likeliest token, also where the text is sampled
SCORED = 4096  # rows whose logits are in memory at a time
EVEN = 16  # a text's length is padded to a multiple of it
DEEPEST = 8  # most steps of a head's own features: the first positions of a text have no pairs for so many


@dataclass(frozen=True)
class Texts:
    """Texts that a model wrote together, `new` tokens behind each prompt.

    tokens   (B, T) int64  prompt, new tokens, padding
    prompts  (B) int64  tokens of each prompt
    taken    (B, T, taps * hidden)  features of the model at each position but the last
    outputs  (B, new, hidden)  of the model's last layer, from which each new token was chosen
    """

    tokens: Tensor
    prompts: Tensor
    taken: Tensor
    outputs: Tensor

    @property
    def written(self) -> Tensor:
        """The new tokens (B, new)."""
        return self.tokens.gather(1, self.prompts.unsqueeze(1) + torch.arange(self.new, device=self.prompts.device))

    @property
    def new(self) -> int:
        """New tokens of each text."""
        return self.outputs.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of features and outputs."""
        return self.taken.nbytes + self.outputs.nbytes


@dataclass(frozen=True)
class Lesson:
    """Texts of similar length, with the model's choice of each new token.

    tokens   (B, T)
    taken    (B, T, taps * hidden)  features of the model
    rows     (m) int64  the row, of B * T, behind which each new token was chosen; none of the first DEEPEST positions
    likely   (m, n) int32  the head's numbers of the likeliest tokens there
    chances  (m, n)  their probabilities, of 1 together
    best     (m) int64  the head's number of the likeliest token, or -1 if the head does not know it
    """

    tokens: Tensor
    taken: Tensor
    rows: Tensor
    likely: Tensor
    chances: Tensor
    best: Tensor


class Writer:
    """Writes texts with a model.

    taps     layers of the model whose outputs make a feature
    most     texts that are written together
    context  most positions of a text
    """

    def __init__(self, model: Engine, taps: Sequence[int], most: int, context: int) -> None:
        decoder, last = model.decoder, len(model.decoder.architecture.layers) - 1
        tapped = Decoder(decoder.architecture, decoder.weights, decoder.context, {*taps, last})
        self.places = [tapped.taps.index(tap) for tap in sorted(taps)]
        self.engine, self.most, self.context = Engine(tapped, None, Options(context, batch=most)), most, context

    def write(self, prompts: Sequence[list[int]], new: int, warm: Sequence[float] = (), seed: int = 0) -> Texts:
        """Texts behind at most `most` prompts, the shortest first.

        new   tokens of each text; end tokens do not end it
        warm  temperature of each text; () for greedy ones
        """
        ordered = sorted(zip(prompts, warm or [0.0] * len(prompts), strict=True), key=lambda pair: len(pair[0]))
        settings = [
            Sampling(max_new_tokens=new, temperature=heat, seed=seed + i, ignore_eos=True)
            for i, (_, heat) in enumerate(ordered)
        ]
        requests = self.engine.requests([prompt for prompt, _ in ordered], settings)
        with self.engine.spaces.lent() as space:
            with torch.inference_mode():
                written = self.written(space, requests, new)
            return self.texts(space, requests, written)

    def written(self, space: Workspace, requests: Sequence[Request], new: int) -> Tensor:
        """The new tokens (B, new) of all texts, on the host."""
        for request in requests:
            request.begin()
        constraints = [request.constraints for request in requests]
        runner = space.runner(len(requests), self.most, self.context, features_of(constraints))
        sampler, cache = runner.sampler, runner.cache
        assert sampler is not None
        sampler.start(constraints)
        prompts = [request.prompt for request in requests]
        first = sampler(behind(runner.reader, prompts)).tokens.cpu()
        runner.place(first.tolist(), [len(prompt) for prompt in prompts], [cache.start(b) for b in range(len(prompts))])
        return torch.stack([first, *(chosen.tokens.cpu() for chosen in runner.steps(new - 1))], 1)

    @torch.no_grad()
    def texts(self, space: Workspace, requests: Sequence[Request], written: Tensor) -> Texts:
        """The texts of requests with these new tokens, whose features are in the cache."""
        cache = space.cache
        assert cache is not None
        assert cache.features is not None
        (count, new), device = written.shape, cache.features.device
        lengths = torch.tensor([len(request.prompt) for request in requests])
        whole = min(padded(int(lengths.max()) + new), cache.context)
        tokens = torch.zeros(count, whole, dtype=torch.int64)
        for row, request in enumerate(requests):
            tokens[row, : len(request.prompt) + new] = torch.tensor([*request.prompt, *written[row].tolist()])
        kept = cache.features.view(cache.batch, cache.context, -1)[:count, :whole]
        hidden = self.engine.decoder.architecture.hidden
        parts = kept.unflatten(-1, (-1, hidden))
        before = (lengths.unsqueeze(1) - 1 + torch.arange(new)).to(device)
        outputs = kept[..., -hidden:].gather(1, before.unsqueeze(2).expand(-1, -1, hidden))
        return Texts(tokens.to(device), lengths.to(device), parts[:, :, self.places].flatten(-2), outputs.clone())

    def lessons(self, texts: Texts, targets: Tensor, rows: int) -> list[Lesson]:
        """Lessons of `rows` texts each, for a head that knows the model's tokens `targets` (n) int64."""
        own = torch.full((self.engine.decoder.architecture.vocabulary,), -1, device=targets.device)
        own[targets] = torch.arange(len(targets), device=targets.device)
        parts = (slice(first, first + rows) for first in range(0, len(texts.tokens), rows))
        return [self.lesson(texts, part, targets, own) for part in parts]

    @torch.no_grad()
    def lesson(self, texts: Texts, part: slice, targets: Tensor, own: Tensor) -> Lesson:
        """The lesson of a part of these texts.

        own  (vocabulary) int64: the head's number of each of the model's tokens, or -1
        """
        prompts, device = texts.prompts[part].unsqueeze(1), own.device
        length = min(padded(int(prompts.max()) + texts.new), texts.tokens.shape[1])
        positions = prompts - 1 + torch.arange(texts.new, device=device)
        rows = torch.arange(len(prompts), device=device).unsqueeze(1) * length + positions
        kept = positions >= DEEPEST
        likely, chances, best = list[Tensor](), list[Tensor](), list[Tensor]()
        for outputs in texts.outputs[part][kept].split(SCORED):
            logits = self.engine.decoder.logits(outputs)
            top = logits[:, targets].topk(min(LIKELIEST, len(targets)))
            likely.append(top.indices.to(torch.int32))
            chances.append((top.values / SHARPENED).softmax(-1))
            best.append(own[logits.argmax(-1)])
        found = (torch.cat(each) for each in (likely, chances, best))
        return Lesson(texts.tokens[part, :length].clone(), texts.taken[part, :length].clone(), rows[kept], *found)


def padded(length: int) -> int:
    """The length of a padded text."""
    return -(-length // EVEN) * EVEN


def behind(reader: Reader, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits (B, vocabulary) after each prompt, which becomes the cache's sequence of its number. Short ones share
    passes."""
    if max(map(len, prompts)) > reader.longest_shared:
        return reader.last_logits(prompts)
    given, most = list(enumerate(prompts)), SHARED_COUNTS[-1]
    groups = (given[first : first + most] for first in range(0, len(given), most))
    return reader.decoder.logits(torch.cat([part for group in groups for part in reader.read_together(group)]))
