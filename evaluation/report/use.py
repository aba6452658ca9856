"""The commands and programs with which engines load a checkpoint."""

import re
from collections.abc import Container
from typing import Any

from lowbit.export.engines.llama_cpp import LLAMA_CPP
from lowbit.export.engines.lowbit import LOWBIT
from lowbit.export.engines.readers import readers_of
from lowbit.export.engines.sglang import SGLANG
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.engines.vllm import VLLM
from lowbit.export.formats import LogicalTensors

PACKAGES = {  # a format's package -> all that pip has to install for transformers
    "compressed-tensors": "accelerate compressed-tensors",
    "gptqmodel": "accelerate gptqmodel optimum",
}
OF_TRANSFORMERS = """\
from transformers import {kind}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {kind}.from_pretrained("{name}", device_map="auto")
inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""
OF_LOWBIT = """\
import lowbit

model = lowbit.load("{name}")
print(model.generate("The capital of France is", max_new_tokens=20)[0].text)"""
OF_LLAMA_CPP = "llama-cli -m {name}/model.gguf"
SNIPPETS = {  # engine -> language and text
    VLLM.name: ("sh", "vllm serve {name}"),
    SGLANG.name: ("sh", "python -m sglang.launch_server --model-path {name}"),
    TRANSFORMERS.name: ("python", OF_TRANSFORMERS),
    LLAMA_CPP.name: ("sh", OF_LLAMA_CPP),
    LOWBIT.name: ("python", OF_LOWBIT),
}
BY_ID = {LLAMA_CPP.name: "llama-cli --hf-repo {name} --hf-file model.gguf"}  # an id on the hub is no path there


def use_of(name: str, tensors: LogicalTensors, refused: Container[str] = ()) -> list[dict[str, Any]]:
    """One row for each engine that loads a checkpoint; empty if it is not quantized.

    name      for the engine: of a directory, or an id on the hub as NAME/MODEL
    refused   engines that do not load the model's family
    reader    the engine
    language  of the code: sh or python
    code      text that loads the checkpoint and runs it
    install   the package that pip has to install besides the engine, or None
    """
    if tensors.format is None:
        return []
    shapes = {linear: tensors.shape(linear) for linear in tensors.schemes}
    sees = tensors.checkpoint.config.get("vision_config") is not None
    values = {"name": plain(name), "kind": "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"}
    package = PACKAGES.get(tensors.format.package, tensors.format.package)
    rows = []
    for reader in readers_of(tensors.format, tensors.schemes, shapes, refused):
        language, text = SNIPPETS[reader]
        text = BY_ID.get(reader, text) if "/" in name else text
        install = package if reader == TRANSFORMERS.name else None
        rows.append({"reader": reader, "language": language, "code": text.format(**values), "install": install})
    return rows


def renamed(text: str, name: str, repo: str) -> str:
    """`text` with the commands of `use_of` for the checkpoint `name`, made to load it from the hub as `repo`."""
    text = text.replace(name, repo)
    for reader, by_id in BY_ID.items():
        text = text.replace(SNIPPETS[reader][1].format(name=repo), by_id.format(name=repo))
    return text


def plain(name: str) -> str:
    """`name` if it needs no quotes in a command; otherwise a placeholder."""
    return name if re.fullmatch(r"[\w./-]+", name, re.ASCII) else "DIR"
