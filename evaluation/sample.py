"""A line of text that a model writes: the quickest look at whether it still makes sense."""

import torch
from transformers import PreTrainedModel

from models.skeleton import fill, open_skeleton
from models.source import Source

PROMPT = "The capital of France is"


def load_dense(source: Source, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model with every weight in memory, packed ones dequantized."""
    skeleton = open_skeleton(source)
    tensors = dict(skeleton.others)
    for block in skeleton.blocks:
        tensors |= block.tensors
    fill(skeleton.model, skeleton.model.modules(), tensors, skeleton.read, device, dtype)
    skeleton.model.tie_weights()
    return skeleton.model


@torch.no_grad()
def continuation(source: Source, prompt: str = PROMPT, tokens: int = 40, device: str = "cpu") -> str:
    """What the model writes after `prompt`, greedily, on one line."""
    tokenizer = source.tokenizer()
    model = load_dense(source, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    # Greedy decoding is asked for here alone; a model's own sampling settings would only draw warnings.
    settings = {"do_sample": False, "max_new_tokens": tokens, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(**inputs, **settings, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return " ".join(str(text).split())
