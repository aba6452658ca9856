"""Heads that draft from the model's features: loaded in the published layouts, equal to plain torch, refused if they
do not fit."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.train_drafter import config_for, write_head
from lowbit import engine
from lowbit.engine.drafts.drafting import Drafting, run_drafted
from lowbit.engine.drafts.heads import MOST
from lowbit.engine.drafts.kinds import Drafter
from lowbit.engine.drafts.round import Round
from lowbit.engine.drafts.training import Eagle3
from lowbit.engine.sampling import Sampling
from lowbit.errors import CheckpointError, EngineError
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from lowbit.serve.session import Session
from tests.builders import make_model, save
from tests.engine.make import CHEAP_ROWS
from tests.engine.test_families import built

LAYERS = 8
PROMPTS = [list(range(3, 20)), [7, 8, 9, 10] * 5, [250, 3, 3, 9], list(range(40, 90))]
TARGETS = torch.arange(0, 260, 2)


def make_eagle(directory, **changes):
    """Writes a model and a drafter: transformers' model, and the head in plain torch."""
    model = make_model("llama", num_hidden_layers=LAYERS, **changes)
    save(model, directory / "model")
    config = config_for(model.config.to_dict(), len(TARGETS))
    torch.manual_seed(1)
    head = Eagle3(config, model.get_input_embeddings().weight.detach())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    write_head(head, config, TARGETS, directory / "drafter")
    return model, head


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directory of a model and a drafter, transformers' model, and the head in plain torch."""
    directory = tmp_path_factory.mktemp("made")
    return directory, *make_eagle(directory)


@pytest.fixture(scope="module")
def drafted(made):
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=made[0] / "drafter")
    found.spaces.costs = CHEAP_ROWS
    return found


@torch.no_grad()
def proposed(model, head, text, count):
    """The tokens that the head in plain torch proposes behind a text."""
    states = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    features = head.fc(torch.cat([states[tap] for tap in (2, LAYERS // 2, LAYERS - 3)], -1))
    tokens, found = list(text[1:]), []
    for _ in range(count):
        out = head(torch.tensor([tokens]), features, [])
        found.append(int(TARGETS[head.logits(out[:, -1:]).argmax()]))
        tokens.append(found[-1])
        features = torch.cat([features, out[:, -1:]], 1)
    return tuple(found)


def proposals_of(drafted, prompts=PROMPTS):
    """Pairs of a text and the drafts behind it that the next step checks, after every step of a batch."""
    requests, found = drafted.requests(prompts, Sampling(max_new_tokens=12, ignore_eos=True)), []
    with drafted.spaces.lent() as space, torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Round, "ahead", 0)  # a step that was launched early would replace the drafts
        space.roomy_reader(len(prompts), 128)
        drafting = Drafting(space, space.drafter(), MOST)
        step = drafting.step

        def watched():
            pieces = step()
            if drafting.round is not None:
                rows = drafting.round.tokens.view(len(drafting.requests), -1).tolist()
                for request, row in zip(drafting.requests, rows, strict=True):
                    if request.left:
                        assert row[0] == request.tokens[-1]
                        found.append((request.sequence, tuple(row[1:])))
            return pieces

        drafting.step = watched
        for _ in run_drafted(drafting, requests):
            pass
    assert len(found) > 10
    return found


def check_proposals(drafted, wanted):
    """`wanted` are the proposals for a text, and a number."""
    for text, tokens in proposals_of(drafted):
        assert tokens == wanted(text, len(tokens))


def test_a_head_proposes_what_plain_torch_does(made, drafted):
    _, model, head = made
    check_proposals(drafted, lambda text, count: proposed(model, head, text, count))


def rms(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def turned(heads, positions, theta=10000.0):
    half = heads.shape[-1] // 2
    angles = positions.unsqueeze(1) * theta ** (-torch.arange(half) / half)
    low, high = heads.chunk(2, -1)
    cosines, sines = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1)


BLOCK = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "block_size": 6,
    "dflash_config": {"mask_token_id": 259, "target_layer_ids": [1, 4, 6]},
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def make_block(directory, model):
    """A block drafter in DFlash's layout: its tensors."""
    a, width = model.config, model.config.head_dim
    heads, kv, inner, hidden = a.num_attention_heads, a.num_key_value_heads, a.intermediate_size, a.hidden_size
    shapes = {"fc": (hidden, 3 * hidden), "norm": (hidden,), "hidden_norm": (hidden,)}
    for layer in range(2):
        each = {"q_proj": (heads * width, hidden), "k_proj": (kv * width, hidden), "v_proj": (kv * width, hidden)}
        each |= {"o_proj": (hidden, heads * width), "q_norm": (width,), "k_norm": (width,)}
        shapes |= {f"layers.{layer}.self_attn.{name}": shape for name, shape in each.items()}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        shapes |= {f"layers.{layer}.mlp.{name}": shape for name, shape in mlp.items()}
        shapes |= {f"layers.{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    torch.manual_seed(2)
    tensors = {
        f"{name}.weight": torch.randn(shape) / shape[-1] ** 0.5 if len(shape) == 2 else 1 + 0.1 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    sizes = {
        "vocab_size": a.vocab_size,
        "head_dim": width,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }
    config = BLOCK | sizes | {"num_key_value_heads": kv, "max_position_embeddings": 256, "num_target_layers": LAYERS}
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


@torch.no_grad()
def block_of(model, tensors, text):
    """All drafts of a block behind a text, in plain torch."""

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].T

    width = model.config.head_dim
    states = model(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
    context = rms(linear(torch.cat([states[i + 1][0] for i in (1, 4, 6)], -1), "fc"), tensors["hidden_norm.weight"])
    x = model.get_input_embeddings()(torch.tensor([text[-1], *[259] * 5]))
    positions = torch.arange(len(text) + 5).float()
    for layer in range(2):
        at = f"layers.{layer}.self_attn."
        normed = rms(x, tensors[f"layers.{layer}.input_layernorm.weight"])
        q, k, v = (
            linear(part, f"{at}{name}_proj").unflatten(-1, (-1, width))
            for part, name in ((normed, "q"), (torch.cat([context, normed]), "k"), (torch.cat([context, normed]), "v"))
        )
        q = turned(rms(q, tensors[f"{at}q_norm.weight"]), positions[-6:])
        k = turned(rms(k, tensors[f"{at}k_norm.weight"]), positions)
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
        weights = (torch.einsum("thd,shd->hts", q, k) / width**0.5).softmax(-1)
        x = x + linear(torch.einsum("hts,shd->thd", weights, v).flatten(1), f"{at}o_proj")
        normed, mlp = rms(x, tensors[f"layers.{layer}.post_attention_layernorm.weight"]), f"layers.{layer}.mlp."
        gated = torch.nn.functional.silu(linear(normed, f"{mlp}gate_proj")) * linear(normed, f"{mlp}up_proj")
        x = x + linear(gated, f"{mlp}down_proj")
    return model.get_output_embeddings()(rms(x, tensors["norm.weight"]))[1:].argmax(-1).tolist()


def test_a_block_drafter_proposes_what_plain_torch_does(made, tmp_path):
    model = made[1]
    tensors = make_block(tmp_path / "block", model)
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=tmp_path / "block")
    found.spaces.costs = CHEAP_ROWS
    check_proposals(found, lambda text, count: tuple(block_of(model, tensors, text)[:count]))
    for change, message in (({"block_size": 64}, "block_size is 64"), ({"dflash_config": {}}, "mask_token_id None")):
        config = json.loads((tmp_path / "block" / "config.json").read_text()) | change
        (tmp_path / "block" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            engine.load(made[0] / "model", device="cpu", context=128, drafter=tmp_path / "block")


@pytest.fixture(scope="module", params=["glm4_moe", "deepseek_v3"])
def carrying(request, tmp_path_factory):
    """A model whose checkpoint carries a head of its own kind: see carried."""
    torch.manual_seed(0)
    return carried(tmp_path_factory.mktemp(request.param), built(request.param))


def carried(directory, model):
    """Writes a model whose checkpoint carries a head of its own kind: the directory, transformers' model, the head's
    layer and its other tensors."""
    save(model, directory)
    count, hidden = model.config.num_hidden_layers, model.config.hidden_size
    layer = type(model.model.layers[-1])(model.config, count - 1).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    more = {
        "enorm": torch.rand(hidden) + 0.5,
        "hnorm": torch.rand(hidden) + 0.5,
        "shared_head.norm": torch.ones(hidden),
    }
    more |= {"eh_proj": torch.randn(hidden, 2 * hidden) / hidden**0.5, "shared_head.head": torch.randn(260, hidden)}
    kept = load_file(directory / "model.safetensors")
    last = {name.removeprefix(f"model.layers.{count - 1}.") for name in kept if f".layers.{count - 1}." in name}
    stored = stored_as(layer, last)
    tensors = {f"model.layers.{count}.{name}": value.contiguous() for name, value in stored.items()}
    tensors |= {f"model.layers.{count}.{name}.weight": value for name, value in more.items()}
    save_file(kept | tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, model, layer, more


def stored_as(layer, names):
    """A layer's tensors under the names that files have: each expert's linears are tensors of their own."""
    found = {}
    for name, value in layer.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, rows in enumerate(value):
                gate, up = rows.chunk(2)
                found |= {f"mlp.experts.{expert}.gate_proj.weight": gate, f"mlp.experts.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            found |= {f"mlp.experts.{expert}.down_proj.weight": rows for expert, rows in enumerate(value)}
        else:
            found[name] = value
    assert set(found) == names
    return found


@torch.no_grad()
def predicted(carrying, text, count):
    """The tokens that the head in plain torch proposes behind a text."""
    _, model, layer, more = carrying
    features, tokens, found = model.model(torch.tensor([text[:-1]])).last_hidden_state, list(text[1:]), []
    for _ in range(count):
        embedded = model.get_input_embeddings()(torch.tensor([tokens]))
        joined = torch.cat([rms(embedded, more["enorm"]), rms(features, more["hnorm"])], -1) @ more["eh_proj"].T
        positions = torch.arange(len(tokens)).unsqueeze(0)
        out = layer(joined, position_embeddings=model.model.rotary_emb(joined, positions), position_ids=positions)
        out = out[0] if isinstance(out, tuple) else out
        found.append(int((rms(out[0, -1], more["shared_head.norm"]) @ more["shared_head.head"].T).argmax()))
        tokens.append(found[-1])
        features = torch.cat([features, out[:, -1:]], 1)
    return tuple(found)


def test_a_checkpoints_own_head_proposes_what_plain_torch_does(carrying):
    found = engine.load(carrying[0], device="cpu", context=128, drafter="mtp")
    found.spaces.costs = CHEAP_ROWS
    check_proposals(found, lambda text, count: predicted(carrying, text, count))


def make_mimo(directory, model):
    """Writes a model of MiMo's kind with its head: transformers' model, and the head's layer and other tensors."""
    hidden = model.config.hidden_size
    save(model, directory)
    layer = deepcopy(model.model.layers[0])
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    more = {f"{part}_layernorm": torch.rand(hidden) + 0.5 for part in ("token", "hidden", "final")}
    more |= {"input_proj": torch.randn(hidden, 2 * hidden) / hidden**0.5}
    tensors = layer.state_dict() | {f"{name}.weight": value for name, value in more.items()}
    tensors = {f"model.mtp_layers.0.{name}": value.contiguous() for name, value in tensors.items()}
    save_file(load_file(directory / "model.safetensors") | tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return model, layer, more


@torch.no_grad()
def predicted_by_mimo(made, text, count):
    """The tokens that MiMo's head in plain torch proposes behind a text: it goes on with its normed output."""
    model, layer, more = made
    features, tokens, found = model.model(torch.tensor([text[:-1]])).last_hidden_state, list(text[1:]), []
    for _ in range(count):
        embedded = model.get_input_embeddings()(torch.tensor([tokens]))
        both = [rms(features, more["hidden_layernorm"]), rms(embedded, more["token_layernorm"])]
        joined, positions = torch.cat(both, -1) @ more["input_proj"].T, torch.arange(len(tokens)).unsqueeze(0)
        out = layer(joined, position_embeddings=model.model.rotary_emb(joined, positions), position_ids=positions)
        out = rms(out[0] if isinstance(out, tuple) else out, more["final_layernorm"])
        found.append(int(model.lm_head(out[0, -1]).argmax()))
        tokens.append(found[-1])
        features = torch.cat([features, out[:, -1:]], 1)
    return tuple(found)


def test_mimos_head_proposes_what_plain_torch_does(tmp_path):
    parts = make_mimo(tmp_path, built("qwen2"))
    found = engine.load(tmp_path, device="cpu", context=128, drafter="mtp")
    torch.testing.assert_close(found.logits([PROMPTS[0]])[0], parts[0](torch.tensor([PROMPTS[0]])).logits[0])
    found.spaces.costs = CHEAP_ROWS
    check_proposals(found, lambda text, count: predicted_by_mimo(parts, text, count))


def test_a_head_behind_windows_is_refused(tmp_path):
    make_mimo(tmp_path, built("qwen2"))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a head behind layers with windows is not computed"):
        engine.load(tmp_path, device="cpu", context=128, drafter="mtp")


def test_a_checkpoint_without_a_head_of_its_own_is_named(made):
    missing = r"no model.layers.8.eh_proj.weight or model.mtp_layers.0.input_proj.weight in its files: it carries no"
    with pytest.raises(CheckpointError, match=missing):
        engine.load(made[0] / "model", device="cpu", context=128, drafter="mtp")


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


def drop_streams(drafted, expected):
    """Streams are dropped after 1 to 5 pieces, before their next drafts are checked; the next text is as expected."""
    for count in range(1, 6):
        stream = drafted.stream(PROMPTS[0], max_new_tokens=40, ignore_eos=True)
        for _ in range(count):
            next(stream)
        stream.close()
        [found] = drafted.generate(PROMPTS[0], max_new_tokens=40, ignore_eos=True)
        assert found.tokens == expected.tokens
        assert found.drafts


def test_a_dropped_stream_leaves_a_head_usable(drafted):
    drop_streams(drafted, drafted.generate(PROMPTS[0], max_new_tokens=40, ignore_eos=True, drafts=0)[0])


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
        ({"architectures": ["LlamaForCausalLM"]}, {}, "no drafter; known are Eagle3, DFlash"),
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


def test_texts_are_written_without_a_drafter_of_another_model_where_it_is_optional(made, tmp_path, caplog):
    other = Drafter(str(changed(made, tmp_path, {"vocab_size": 300})), required=False)
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=other)
    assert "the drafter's vocabulary is 300" in caplog.text
    assert "texts are written without the drafter" in caplog.text
    plain = engine.load(made[0] / "model", device="cpu", context=128)
    [expected] = plain.generate(PROMPTS[0], max_new_tokens=9)
    assert [each.tokens for each in found.generate(PROMPTS[0], max_new_tokens=9)] == [expected.tokens]


def test_the_residual_may_be_the_feature_itself(made, tmp_path):
    head = deepcopy(made[2])
    head.normed = False
    directory = changed(made, tmp_path, {"norm_before_residual": False})
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=directory)
    found.spaces.costs = CHEAP_ROWS
    check_proposals(found, lambda text, count: proposed(made[1], head, text, count))


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_a_head_is_rounded_while_loading(made, scheme):
    """It proposes what plain torch does with the same rounded weights."""
    rounded = deepcopy(made[2])
    for name, parameter in rounded.named_parameters():
        if parameter.ndim == 2:
            weight = round_to_nearest(parameter.data, parse_scheme(scheme), torch.float32)
            rounded.get_parameter(name).data = weight.dequantize(torch.float32)
    drafter = Drafter(str(made[0] / "drafter"), scheme)
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=drafter)
    found.spaces.costs = CHEAP_ROWS
    check_proposals(found, lambda text, count: proposed(made[1], rounded, text, count))


def test_a_drafter_that_does_not_fit_is_named_or_left_out(made, monkeypatch, caplog):
    def short(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("lowbit.engine.workspace.Heads", short)
    needed = engine.load(made[0] / "model", device="cpu", context=128, drafter=made[0] / "drafter")
    with pytest.raises(EngineError, match=r"keys and values of 1 sequences of \d+ positions do not fit: leave it out"):
        needed.generate(PROMPTS[:1], max_new_tokens=9)
    expected = needed.generate(PROMPTS, max_new_tokens=9, drafts=0)
    drafter = Drafter(str(made[0] / "drafter"), required=False)
    spared = engine.load(made[0] / "model", device="cpu", context=128, drafter=drafter)
    assert [each.tokens for each in spared.generate(PROMPTS, max_new_tokens=9)] == [each.tokens for each in expected]
    assert "do not fit: texts are written without it" in caplog.text


def test_drafts_of_a_head_change_no_text_of_a_session(drafted):
    settings = Sampling(max_new_tokens=24, ignore_eos=True)
    expected = drafted.generate(PROMPTS, settings, drafts=0)
    with Session(drafted, sequences=3) as session:
        for prompt, plain in zip([*PROMPTS, PROMPTS[0]], [*expected, expected[0]], strict=True):  # the last one reuses
            pieces = list(session.stream(prompt, settings))
            assert tuple(token for piece in pieces for token in piece.tokens) == plain.tokens
        assert session.batch.drafts.made is not None


def test_the_layout_of_speculators_is_read_too(made, tmp_path):
    kept = load_file(made[0] / "drafter" / "model.safetensors")
    renamed = {name.replace("midlayer.", "layers.0."): value for name, value in kept.items()}
    directory = changed(made, tmp_path, {"architectures": ["Eagle3Speculator"]}, dict.fromkeys(kept) | renamed)
    found = engine.load(made[0] / "model", device="cpu", context=128, drafter=directory)
    assert any(each.drafts for each in found.generate(PROMPTS, max_new_tokens=20, ignore_eos=True))
