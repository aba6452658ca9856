"""Logits and tokens of llama.cpp for a GGUF, through the bindings of llama-cpp-python.

    PYTHON llama_logits.py MODEL.gguf IN.json OUT.json

IN has `ids`, a list of tokens, and `texts`. OUT gets `logits`, a list for each token, from one decoding with float32
caches, and `tokens`, those of each text with special tokens parsed and none added.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("asked", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    asked = json.loads(arguments.asked.read_text())
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(arguments.model.encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {arguments.model}")
    found = {
        "logits": logits_of(model, asked["ids"]) if asked["ids"] else [],
        "tokens": [tokens_of(model, text) for text in asked["texts"]],
    }
    arguments.out.write_text(json.dumps(found))


def logits_of(model: Any, ids: list[int]) -> list[list[float]]:
    """The logits after each of the tokens `ids`."""
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(len(ids), 64)
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    if llama.llama_decode(context, batch) != 0:
        raise SystemExit("llama.cpp does not decode the tokens")
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    return [llama.llama_get_logits_ith(context, place)[:size] for place in range(len(ids))]


def tokens_of(model: Any, text: str) -> list[int]:
    """The tokens of a text."""
    raw = text.encode()
    room = (llama.llama_token * (len(raw) + 16))()
    count = llama.llama_tokenize(llama.llama_model_get_vocab(model), raw, len(raw), room, len(room), False, True)
    return list(room[:count])


if __name__ == "__main__":
    main()
