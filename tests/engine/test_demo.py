"""The demo model: the engine's logits and text are transformers', and drafts change steps, not tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit import engine

pytestmark = pytest.mark.demo
PROMPTS = ["The capital of France is", "for i in range(10):\n    print(i)\nfor j in range(10):\n"]


def test_the_demo_model_is_transformers(demo_model):
    model = engine.load(demo_model, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    ids = model.encode(PROMPTS[1])
    with torch.no_grad():
        wanted = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.logits([ids])[0], wanted, atol=2e-3, rtol=1e-3)
    plain = model.generate(PROMPTS, max_new_tokens=16)
    assert "Paris" in plain[0].text
    drafted = model.generate(PROMPTS, max_new_tokens=16, lookup=5)
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    assert drafted[1].steps <= plain[1].steps
