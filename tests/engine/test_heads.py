"""Heads that draft from the model's features: loaded in the published layouts, equal to plain torch, refused if they
do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.train_drafter import Eagle3, config_for, taps_of, write_head
from lowbit import engine
from lowbit.engine.sampling import Sampling
from lowbit.errors import CheckpointError
from tests.builders import make_model, save
from tests.engine.make import CHEAP_ROWS

LAYERS = 8
PROMPTS = [list(range(3, 20)), [7, 8, 9, 10] * 5, [250, 3, 3, 9], list(range(40, 90))]
TARGETS = torch.arange(0, 260, 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model's directory, a drafter's, transformers' model, and the head in plain torch."""
    directory = tmp_path_factory.mktemp("made")
    model = make_model("llama", num_hidden_layers=LAYERS)
    save(model, directory / "model")
    config = config_for(model.config, len(TARGETS))
    torch.manual_seed(1)
    head = Eagle3(config, model.get_input_embeddings().weight.detach())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_head(head, config, TARGETS, directory / "drafter")
    return directory, model, head


@pytest.fixture(scope="module")
def drafted(made):
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=made[0] / "drafter")
    found.spaces.costs = CHEAP_ROWS
    return found


@torch.no_grad()
def proposed(model, head, text, count):
    """The tokens that the head in plain torch proposes behind a text."""
    states = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    features = head.fc(torch.cat([states[tap] for tap in taps_of(LAYERS)], -1))
    tokens, found = list(text[1:]), []
    for _ in range(count):
        out = head(torch.tensor([tokens]), features, [])
        found.append(int(TARGETS[head.logits(out[:, -1:]).argmax()]))
        tokens.append(found[-1])
        features = torch.cat([features, out[:, -1:]], 1)
    return tuple(found)


def test_a_head_proposes_what_plain_torch_does(made, drafted):
    """Behind prompts, and again after every step; in a batch."""
    _, model, head = made
    requests = drafted.requests(PROMPTS, Sampling(max_new_tokens=12, ignore_eos=True))
    seen, checked = [], 0
    with drafted.spaces.lent() as space, torch.inference_mode():
        space.roomy_reader(len(PROMPTS), 128)
        drafter = space.drafter()
        propose = drafter.propose
        drafter.propose = lambda sequences, most: seen.append((sequences, propose(sequences, most))) or seen[-1][1]
        texts = [[] for _ in PROMPTS]
        for piece in drafted.drafted(requests, space):
            texts[piece.request] += piece.tokens
            for sequences, proposals in seen:
                for sequence, proposal in zip(sequences, proposals, strict=True):
                    if sequence >= piece.request:  # its tokens of this step are not known yet
                        text = PROMPTS[sequence] + texts[sequence]
                        text = text[: len(text) - len(piece.tokens)] if sequence == piece.request else text
                        assert proposal.tokens == proposed(model, head, text, len(proposal.tokens))
                        checked += 1
            seen.clear()
    assert checked > 10


def test_no_draft_changes_a_token(made, drafted):
    plain = engine.load(made[0] / "model", device="cpu", context=128)
    for settings in ({}, {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.2}):
        expected = plain.generate(PROMPTS, max_new_tokens=40, ignore_eos=True, **settings)
        found = drafted.generate(PROMPTS, max_new_tokens=40, ignore_eos=True, **settings)
        assert [each.tokens for each in found] == [each.tokens for each in expected]
        assert any(each.drafts for each in found)
        undrafted = drafted.generate(PROMPTS, max_new_tokens=40, ignore_eos=True, drafts=0, **settings)
        assert [each.tokens for each in undrafted] == [each.tokens for each in expected]
        assert not any(each.drafts for each in undrafted)


def changed(made, tmp_path, config=None, tensors=None):
    """A copy of the drafter with other fields or tensors; a tensor of None is left out."""
    source = made[0] / "drafter"
    found = json.loads((source / "config.json").read_text()) | (config or {})
    kept = load_file(source / "model.safetensors") | (tensors or {})
    save_file({name: value for name, value in kept.items() if value is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(found))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"vocab_size": 300}, {}, "the drafter's vocabulary is 300, that of the model 260: it was made for another"),
        ({"target_hidden_size": 96}, {}, "hidden size of its model is 96, that of the model"),
        ({"eagle_aux_hidden_state_layer_ids": [3, 5, 90]}, {}, r"outputs of layers \[2, 4, 89\] .*the model has 8"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 5, 6]}, {}, r"outputs of layers \[-1, 4, 5\]"),
        ({"eagle_aux_hidden_state_layer_ids": [2, "a", 6]}, {}, "no drafter that the engine can run"),
        ({"fc_norm": True}, {}, "fc_norm is True; the engine computes only False"),
        ({"architectures": ["LlamaForCausalLM"]}, {}, "no drafter; known are Eagle3"),
        ({"draft_vocab_size": 131}, {}, "has shape .*130"),
        ({}, {"fc.weight": None}, "tensor 'fc.weight' is in no file"),
        ({}, {"d2t": torch.full((130,), 255)}, "d2t leads 130 tokens to 255 .. 384, 130 of them different"),
        ({}, {"d2t": torch.arange(129, -1, -1) - torch.arange(130) * 2 + 0}, "d2t leads 130 tokens"),
        ({}, {"more.weight": torch.ones(2)}, "1 tensors do not belong"),
    ],
)
def test_a_drafter_that_does_not_fit_is_named(made, tmp_path, config, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        engine.load(made[0] / "model", device="cpu", context=128, drafter=changed(made, tmp_path, config, tensors))


def test_the_layout_of_speculators_is_read_too(made, tmp_path):
    kept = load_file(made[0] / "drafter" / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): value for name, value in kept.items()}
    directory = changed(made, tmp_path, {"architectures": ["Eagle3Speculator"]}, dict.fromkeys(kept) | renamed)
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=directory)
    assert any(each.drafts for each in found.generate(PROMPTS, max_new_tokens=20, ignore_eos=True))
