"""Every scheme inside vLLM, by our plugin or its own kernels: log-probabilities beside the dense model's, tiny Llamas.

    python -m benchmarks.vllm_schemes write DIR                   checkpoints with heads of 128, one a scheme
    PYTHON benchmarks/peers/read_texts.py DIR/* --out TEXTS       in vLLM's environment; with --graphs, --own, --split 2
    python -m benchmarks.vllm_schemes compare DIR TEXTS --commit COMMIT --output FILE

A row has, for the tokens of prompts and for new tokens, the mean and the largest distance to the dense model in float32
with inputs rounded as the scheme says, and the standard deviation of its log-probabilities. Where vLLM's own kernels
are closer to the model whose inputs are not rounded, the row's `inputs` says so, and its distances are to that.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import run_facts
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.builders import make_model, save
from tests.quantized import dense, quantize_files, write_config

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
SCHEMES = (
    *("int2-g32", "int3-g64", "int4-g128", "uint4-g32", "int5-g64", "int6-channel", "int7-g32", "int8-channel"),
    *("int8-channel-a8token", "int8-channel-a8tensor", "fp8-a16", "fp8", "fp8-static", "fp8-block", "mxfp8-a16"),
    *("nvfp4-a16", "nvfp4", "mxfp4-a16", "mxfp4"),
)
WITH_HEAD = "int4-g32, head fp8-a16, embeddings int8-channel"
LEFT = ("lm_head", "model.layers.1.mlp.down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description="every scheme inside vLLM with our plugin")
    parser.add_argument("step", choices=["write", "compare"])
    parser.add_argument("models", type=Path)
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.step == "write":
        for text in SCHEMES:
            save(make_model("llama", **SIZES, **HEADS), args.models / text, torch.bfloat16)
            quantize_files(args.models / text, "compressed-tensors", text, LEFT)
        write_with_head(args.models / WITH_HEAD)
        return
    with args.output.open("a") as out:
        for line in args.texts.read_text().splitlines():
            row = compared(json.loads(line), args.models) | run_facts(args.commit)
            out.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def write_with_head(directory: Path) -> None:
    """A checkpoint whose head and embeddings are quantized too, each in a scheme of its own."""
    save(make_model("llama", **SIZES, **HEADS), directory, torch.bfloat16)
    quantize_files(directory, "compressed-tensors", "int4-g32", ())
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    linears = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    schemes = dict.fromkeys(linears, parse_scheme("int4-g32"))
    for name, text in (("lm_head", "fp8-a16"), ("model.embed_tokens", "int8-channel")):
        schemes[name] = parse_scheme(text)
        weight = round_to_nearest(tensors.pop(f"{name}.weight").float(), schemes[name], torch.bfloat16)
        tensors |= COMPRESSED_TENSORS.write(name, weight)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, config, COMPRESSED_TENSORS, COMPRESSED_TENSORS.quantization_config(schemes, ()))


def compared(read: dict[str, Any], models: Path) -> dict[str, Any]:
    """The row of a checkpoint that was read."""
    row = {"scheme": read["name"], **{key: read[key] for key in ("mode", "own", "split", "vllm")}}
    if "error" in read:
        return row | {"error": read["error"]}
    found = [distances(read["texts"], models / read["name"], rounded) for rounded in (True, False)]
    closest = min(found, key=lambda each: each["prompt"][0]) if read["own"] else found[0]
    if found[0]["prompt"] == found[1]["prompt"]:  # a scheme that rounds no inputs
        del closest["inputs"]
    return row | closest


def distances(texts: list[dict[str, Any]], directory: Path, rounded: bool) -> dict[str, Any]:
    """Distances to the dense model, whose inputs are rounded as the scheme says or not at all."""
    model, spread = dense(directory, rounded), []
    far: dict[str, list[torch.Tensor]] = {"prompt": [], "new": []}
    for text in texts:
        ids = torch.tensor([text["prompt"] + text["new"]])
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        wanted = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        spread.append(wanted)
        parts = wanted.split([len(text["prompt"]) - 1, len(text["new"])])
        for (name, values), part in zip(far.items(), parts, strict=True):
            values.append((part - torch.tensor(text[f"{name}_rows"])).abs())
    every = {name: torch.cat(values) for name, values in far.items()}
    means = {name: [round(float(each.mean()), 4), round(float(each.max()), 4)] for name, each in every.items()}
    inputs = "rounded" if rounded else "in half precision"
    return means | {"deviation": round(float(torch.cat(spread).std()), 3), "inputs": inputs}


if __name__ == "__main__":
    main()
