"""On a GPU: heads of every kind draft in captured graphs what plain torch drafts in float32, and no draft changes a
token."""

import pytest
import torch
import transformers

from lowbit import engine
from lowbit.engine.drafts.kinds import Drafter
from tests.builders import GATED
from tests.engine.make import CHEAP_ROWS
from tests.engine.test_families import GROUPED, LATENT
from tests.engine.test_heads import (
    PROMPTS,
    block_of,
    carried,
    drop_streams,
    make_block,
    make_eagle,
    make_mimo,
    predicted,
    predicted_by_mimo,
    proposals_of,
    proposed,
)

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
# all experts are chosen: among some, a last bit of half precision may choose others
ALL = GROUPED | {"num_experts_per_tok": 8, "topk_group": 4}
GLM = GATED | ALL | WIDE | {"first_k_dense_replace": 1}
DEEPSEEK = LATENT | ALL | {"hidden_size": 256, "kv_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64}
CARRYING = {"Glm4MoeConfig": GLM, "DeepseekV3Config": DEEPSEEK | {"v_head_dim": 64}}


def loaded(directory, drafter, dtype):
    found = engine.load(directory, "cuda", dtype, context=128, drafter=drafter)
    found.spaces.costs = CHEAP_ROWS
    return found


def check(directory, drafter, wanted):
    """Proposals are those of float32, but for some that a last bit decides; texts are those without drafts."""
    check_float32(directory, drafter, wanted)
    for dtype in (torch.float16, torch.bfloat16):
        model = loaded(directory, drafter, dtype)
        for settings in ({}, {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.2}):
            asked = {"max_new_tokens": 40, "ignore_eos": True, **settings}
            for prompts in (PROMPTS[:1], PROMPTS):
                expected = [model.generate([prompt], drafts=0, **asked)[0] for prompt in prompts]
                completions = model.generate(prompts, **asked)
                assert [each.tokens for each in completions] == [each.tokens for each in expected]
                assert any(each.drafts for each in completions)
        drop_streams(model, model.generate(PROMPTS[0], max_new_tokens=40, ignore_eos=True, drafts=0)[0])


def check_float32(directory, drafter, wanted):
    drafted = loaded(directory, drafter, torch.float16)
    found = [(tokens, wanted(text, len(tokens))) for text, tokens in proposals_of(drafted)]
    first = sum(ours[0] == theirs[0] for ours, theirs in found)
    assert first >= 0.9 * len(found), found
    assert sum(ours == theirs for ours, theirs in found) >= 0.7 * len(found), found


@pytest.mark.parametrize("scheme", ["dense", "int8", "int4-g64"])
def test_eagle(tmp_path, scheme):
    model, head = make_eagle(tmp_path, **WIDE)
    if scheme == "dense":
        check(tmp_path / "model", tmp_path / "drafter", lambda text, count: proposed(model, head, text, count))
        return
    drafted = loaded(tmp_path / "model", Drafter(str(tmp_path / "drafter"), scheme), torch.float16)
    expected = drafted.generate(PROMPTS, max_new_tokens=40, ignore_eos=True, drafts=0)
    completions = drafted.generate(PROMPTS, max_new_tokens=40, ignore_eos=True)
    assert [each.tokens for each in completions] == [each.tokens for each in expected]


def test_blocks(tmp_path):
    model, _ = make_eagle(tmp_path, **WIDE)
    tensors = make_block(tmp_path / "block", model)
    check(tmp_path / "model", tmp_path / "block", lambda text, count: tuple(block_of(model, tensors, text)[:count]))


@pytest.mark.parametrize("name", CARRYING)
def test_a_checkpoints_own(tmp_path, name):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**CARRYING[name])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    parts = carried(tmp_path, model)
    # latent attention is plain torch, whose sums depend on the rows of a step: texts may differ by a last bit
    test = check_float32 if name == "DeepseekV3Config" else check
    test(tmp_path, "mtp", lambda text, count: predicted(parts, text, count))


def test_mimos(tmp_path):
    config = transformers.Qwen2Config(**GATED | {"hidden_size": 256, "num_attention_heads": 4})
    torch.manual_seed(0)
    parts = make_mimo(tmp_path, transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    check(tmp_path, "mtp", lambda text, count: predicted_by_mimo(parts, text, count))
