"""vLLM behind two functions. Only this module uses vLLM, and imports it on first use."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError


class VllmModel:
    """A checkpoint loaded by vLLM. CheckpointError if vLLM is missing or rejects the checkpoint."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        try:
            import vllm
        except ImportError as error:
            raise CheckpointError(
                f"--backend vllm: vLLM is not installed here ({error}); it pins a torch of its own, so it belongs in "
                "an environment of its own, together with lowbit"
            ) from error
        self._sampling: Any = vllm.SamplingParams
        name = str(dtype).removeprefix("torch.")
        try:
            self._model: Any = vllm.LLM(str(directory), dtype=name, enable_prefix_caching=False)
        except (ValueError, RuntimeError, OSError) as error:
            raise CheckpointError(f"vLLM does not load {directory}: {' '.join(str(error).split())[:300]}") from error

    def log_likelihoods(self, ids: Tensor) -> Tensor:
        """float32 log-likelihoods (B, T - 1) of ids (B, T) after each row's first."""
        settings = self._sampling(max_tokens=1, temperature=0, prompt_logprobs=0)
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
        outputs = self._model.generate(prompts, settings, use_tqdm=False)
        return torch.tensor([_given(row, output) for row, output in zip(ids.tolist(), outputs, strict=True)])

    def generate(self, prompt: list[int], tokens: int, stops: list[str]) -> list[int]:
        """The greedy continuation of `prompt`, until one of `stops` appears."""
        settings = self._sampling(max_tokens=tokens, temperature=0, stop=stops or None, include_stop_str_in_output=True)
        [output] = self._model.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
        return list(output.outputs[0].token_ids)


def _given(row: list[int], output: Any) -> list[float]:
    """The log-likelihoods of all tokens in `row` but the first."""
    return [float(output.prompt_logprobs[i][token].logprob) for i, token in enumerate(row) if i]
