"""llama.cpp reads every type that we write, of every family, and computes what our weights mean.

LOWBIT_PEERS/llama has `bin/python` with llama-cpp-python (0.3.36 was tried) and `bin/llama-quantize` of the same build.
llama.cpp rounds inputs to 8 bits when it multiplies blocks. So its logits are compared twice: those of the file, within
what 8 bits lose; and those of a float32 file that llama.cpp made of our blocks, to the rounding of float32.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.export.gguf.mixtures import MIXTURES
from tests.builders import logits_of, save_family
from tests.export.test_gguf import CHANGES, YARN
from tests.golden.test_readers import interpreter, run_peer

pytestmark = [pytest.mark.peer, pytest.mark.slow]

IDS = torch.randint(0, 250, (24,), generator=torch.Generator().manual_seed(0)).tolist()
EXACT, LOOKED_UP = 1e-5, 3e-3  # llama.cpp takes GELU from a table of float16
GELU = ("gemma2", "gemma3", "gpt2")
ROUNDED = 0.05  # deviation of logits of 0.9, with inputs of 8 bits


def logits_by_them(file: Path, place: Path) -> torch.Tensor:
    asked, out = place / "asked.json", place / "logits.json"
    asked.write_text(json.dumps({"ids": IDS, "texts": []}))
    run_peer("llama", "llama_logits.py", file, asked, out)
    return torch.tensor(json.loads(out.read_text())["logits"])


def expanded_by_them(file: Path, place: Path) -> Path:
    """A float32 file that llama.cpp made of the blocks in `file`."""
    program = Path(interpreter("llama")).parent / "llama-quantize"
    command = [program, "--allow-requantize", file, place / "float32.gguf", "F32", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return place / "float32.gguf"


def meant(model: Path, output: Path, place: Path) -> torch.Tensor:
    """Our logits, in float32, of the weights that the GGUF in `output` stands for."""
    logical, dense = LogicalTensors(open_checkpoint(output)), open_checkpoint(model)
    tensors = {name: logical.exact(name).float().contiguous() for name in logical.names}
    for name, tensor in tensors.items():
        if tensor.shape != dense.shape(name) or (".c_" in name and logical.is_quantized(name)):
            tensors[name] = tensor.T.contiguous()
    place.mkdir()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_bytes((model / "config.json").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return logits_of(loaded.eval(), torch.tensor([IDS]))[0]


def require_same(family: str, scheme: str, place: Path, **changes: Any) -> None:
    model = save_family(family, place / "tiny", torch.float16, **CHANGES[family] | changes)
    output = place / "out"
    lowbit.quantize(model, output, method="rtn", scheme=scheme, format="gguf", device="cpu", eval_windows=0)
    ours = meant(model, output, place / "dense")
    exact = logits_by_them(expanded_by_them(output / "model.gguf", place), place)
    assert float((exact - ours).abs().max()) < (LOOKED_UP if family in GELU else EXACT)
    rounded = logits_by_them(output / "model.gguf", place)
    assert float((rounded - ours).square().mean().sqrt()) < ROUNDED * float(ours.std())


@pytest.mark.parametrize("family", CHANGES)
def test_every_family(family: str, tmp_path: Path) -> None:
    require_same(family, "q4_k_m", tmp_path)


@pytest.mark.parametrize("scheme", sorted({mixture.name for mixture in MIXTURES.values()} - {"q4_k_m"}))
def test_every_mixture(scheme: str, tmp_path: Path) -> None:
    require_same("llama", scheme, tmp_path)


BASE = {"rope_theta": 1e4}
LONG = {"rope_type": "longrope", "long_factor": [1 + 0.3 * i for i in range(32)], **BASE}
LONG |= {"short_factor": [1 + 0.1 * i for i in range(32)]}
STRETCHED = YARN | {"original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **BASE}
LLAMA3 |= {"original_max_position_embeddings": 16}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


def stretched_to(before: int, **settings: Any) -> dict[str, Any]:
    """Phi 3 with a longer context; llama.cpp chooses the factors by that of its run, 256 here."""
    lengths = {"max_position_embeddings": 2048, "original_max_position_embeddings": before}
    return lengths | {"rope_parameters": LONG | {"original_max_position_embeddings": before} | settings}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"rope_parameters": STRETCHED}),
        ("llama", {"rope_parameters": STRETCHED | {"attention_factor": 1.5}}),
        ("llama", {"rope_parameters": STRETCHED | {"mscale": 0.707, "mscale_all_dim": 1.0}}),
        ("llama", {"rope_parameters": BASE | {"rope_type": "linear", "factor": 3.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"head_dim": 96}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3", {"head_dim": 96, "rope_parameters": STRETCHED}),
        ("gemma3", {"rope_parameters": {"full_attention": BASE | {"rope_type": "linear", "factor": 8.0}} | LOCAL}),
        ("gemma3", {"tie_word_embeddings": False}),
        ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
        ("gpt2", {"tie_word_embeddings": False, "n_inner": 512}),
        ("phi3", {"rope_parameters": BASE | {"partial_rotary_factor": 0.5}}),
        ("phi3", stretched_to(512)),
        ("phi3", stretched_to(16)),
        ("phi3", stretched_to(16, attention_factor=1.3)),
    ],
)
def test_every_setting(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    require_same(family, "q4_k_m", tmp_path, **change)


def test_a_dialogue_has_the_same_tokens(tmp_path: Path) -> None:
    model = Path(os.environ.get("LOWBIT_CACHE", Path.home() / ".cache" / "lowbit")) / "demo-0.1.2-r1"
    if not model.exists():
        pytest.skip("the demo model is not here")
    tokenizer = AutoTokenizer.from_pretrained(model)
    dialogue = [
        {"role": "user", "content": "How much is 12 times 345?"},
        {"role": "assistant", "content": "4140, é."},
    ]
    texts = [tokenizer.apply_chat_template(dialogue, tokenize=False), "def f(x):\n    return x  # 1234\n\n\n\tend"]
    lowbit.quantize(model, tmp_path / "out", method="rtn", scheme="q8_0", format="gguf", device="cpu", eval_windows=0)
    asked, out = tmp_path / "asked.json", tmp_path / "out.json"
    asked.write_text(json.dumps({"ids": [], "texts": texts}))
    run_peer("llama", "llama_logits.py", tmp_path / "out" / "model.gguf", asked, out)
    wanted = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert json.loads(out.read_text())["tokens"] == wanted
