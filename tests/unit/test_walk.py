"""models/: one block in memory at a time, tensors at their places, and models that contradict config.json."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.errors import CheckpointError
from lowbit.models.placement import Placement, place
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from lowbit.models.states import States, joined, pulled
from lowbit.models.walk import Walk
from tests.builders import (
    CONNECTED,
    FAMILIES,
    UNUSUAL,
    calibration,
    changed_config,
    logits_of,
    make_model,
    save,
    save_family,
)
from tests.families.tiny import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("llama") / "model")


def in_memory(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}


def test_one_block_is_in_memory_at_a_time(llama):
    skeleton = open_skeleton(open_source(str(llama)))
    walk = Walk(skeleton, "cpu", torch.float32)
    assert in_memory(skeleton.model) == set()
    hidden = walk.start([calibration().ids])
    assert in_memory(skeleton.model) == set()
    for index, block in enumerate(skeleton.blocks):
        with walk.loaded(index):
            held = in_memory(skeleton.model)
            assert held
            assert all(name.startswith(f"{block.name}.") for name in held)
            hidden = [walk.run(index, states) for states in hidden]
        assert in_memory(skeleton.model) == set()


def test_a_block_is_given_back_when_its_work_fails(llama):
    skeleton = open_skeleton(open_source(str(llama)))
    walk = Walk(skeleton, "cpu", torch.float32)
    with pytest.raises(ValueError, match="boom"), walk.loaded(0):
        raise ValueError("boom")
    assert in_memory(skeleton.model) == set()


def test_blocks_are_learned_in_eight_passes_and_once(llama):
    """One with the first block, one through the stubs to the head, four that stop at the last block, two of the head's
    input; then a pass for each batch."""
    skeleton = open_skeleton(open_source(str(llama)))
    walk, passes = Walk(skeleton, "cpu", torch.float32), []
    skeleton.model.register_forward_pre_hook(lambda module, args: passes.append(module))
    walk.start([calibration(1, 8).ids])
    assert len(passes) == 8 + 1
    walk.start([calibration(1, 8).ids, calibration(2, 8).ids])
    assert len(passes) == 8 + 1 + 2


def test_batches_of_every_shape_are_walked(llama):
    skeleton = open_skeleton(open_source(str(llama)))
    walk = Walk(skeleton, "cpu", torch.float32)
    ids = [calibration(3, 8).ids, calibration(1, 17).ids, calibration(5, 1).ids]
    batches = walk.start(ids)
    assert [tuple(states.hidden.shape) for states in batches] == [(3, 8, 64), (1, 17, 64), (5, 1, 64)]
    with walk.loaded(0):
        after = [walk.run(0, states) for states in batches]
    assert [tuple(states.hidden.shape) for states in after] == [(3, 8, 64), (1, 17, 64), (5, 1, 64)]


@pytest.mark.parametrize("family", [*FAMILIES, *CONNECTED, *UNUSUAL])
def test_logits_by_blocks_are_the_models_for_two_batches_of_a_shape_and_one_of_another(family, tmp_path):
    model = make_model(family)
    directory = save(model, tmp_path)
    ids = [calibration(2, 24, seed=1).ids, calibration(2, 24, seed=2).ids, calibration(3, 9, seed=3).ids]
    walk, left = walked(directory, ids)
    for batch, logits in zip(ids, walk.logits(ids, left), strict=True):
        wanted = logits_of(model, batch)
        assert (logits - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("family", ["llama", *CONNECTED, "deepseek_v4"])
def test_sequences_of_several_batches_make_a_batch(family, tmp_path):
    """Calibration draws sequences from all batches: what belongs to their tokens comes along."""
    model = make_model(family)
    directory = save(model, tmp_path)
    ids = [calibration(2, 24, seed=1).ids, calibration(2, 24, seed=2).ids]
    mixed = torch.stack([ids[1][1], ids[0][0]])
    walk, left = walked(directory, ids, lambda batches: [joined([batches[1].rows()[1], batches[0].rows()[0]])])
    (logits,) = walk.logits([mixed], left)
    wanted = logits_of(model, mixed)
    assert (logits - wanted).norm() <= 1e-5 * wanted.norm()


def walked(
    directory: Path, ids: list[torch.Tensor], halfway: Callable[[list[States]], list[States]] = list
) -> tuple[Walk, list[States]]:
    """A walk through all blocks and what left the last one; `halfway` acts on what enters the middle one."""
    walk = Walk(open_skeleton(open_source(str(directory))), "cpu", torch.float32)
    batches = walk.start(ids)
    count = len(walk.skeleton.blocks)
    for index in range(count):
        if index == count // 2:
            batches = halfway(batches)
        with walk.loaded(index), torch.no_grad():
            batches = [walk.run(index, states) for states in batches]
    return walk, batches


def test_a_model_that_runs_its_blocks_again_and_again_is_refused_by_the_walk_alone(tmp_path):
    source = open_source(str(save_tiny("hrm_text", tmp_path)))
    with pytest.raises(CheckpointError, match="does not run its 2 blocks one after another, each once, but 12 times"):
        Walk(open_skeleton(source), "cpu", torch.float32).start([calibration(1, 9).ids])
    assert prepare(source, complete_recipe({"method": "int8"}), "cpu").plan.schemes


@pytest.mark.parametrize("place", ["block", "head"])
def test_a_model_that_computes_with_embeddings_or_outputs_behind_its_blocks_is_refused(llama, place):
    """Inkling 2 attends to the inputs of earlier blocks, between blocks and before its head."""
    skeleton = open_skeleton(open_source(str(llama)))
    seen = []
    skeleton.model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    decoder = skeleton.model.model
    behind = decoder.norm if place == "head" else decoder.layers[1]
    behind.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + seen[-1], *args[1:]), kwargs), with_kwargs=True
    )
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM .* it cannot be run block by block"):
        Walk(skeleton, "cpu", torch.float32).start([torch.arange(16).view(2, 8)])


@pytest.mark.parametrize("kind", ["openai-gpt", "prophetnet"])
def test_blocks_that_return_lists_and_embeddings_that_are_tied_inside(kind, tmp_path):
    ids = [calibration(2, 9).ids]
    directory = save_tiny(kind, tmp_path)
    walk, left = walked(directory, ids)
    (logits,) = walk.logits(ids, left)
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(directory), ids[0])
    assert (logits - wanted).norm() <= 1e-5 * wanted.norm()


def test_what_blocks_hand_each_other_can_be_sent_to_another_process(tmp_path):
    directory = save_family("gemma4", tmp_path)
    walk = Walk(open_skeleton(open_source(str(directory))), "cpu", torch.float32)
    (entering,) = walk.start([calibration(2, 9).ids])
    with walk.loaded(0), torch.no_grad():
        left = walk.run(0, entering)
    sent = entering.unpacked(left.packed())
    assert sent.carried.keys() == left.carried.keys() != set()
    assert all(torch.equal(one, other) for one, other in zip(sent.flow, left.flow, strict=True))


def test_a_gradient_runs_through_what_blocks_hand_each_other(tmp_path):
    """The gradient by what enters block 1, pulled block by block, is that of the whole."""
    directory = save_family("gemma4", tmp_path)
    walk = Walk(open_skeleton(open_source(str(directory))), "cpu", torch.float32)
    (entering,) = walk.start([calibration(2, 9).ids])
    with ExitStack() as stack:
        for index in range(4):
            stack.enter_context(walk.loaded(index))
        runs = [partial(walk.run, index) for index in range(4)]
        with torch.no_grad():
            states = [runs[0](entering)]
            for run in runs[1:]:
                states.append(run(states[-1]))
        gradient = [torch.ones_like(states[-1].hidden), *(None for _ in states[-1].flow[1:])]
        for run, before in zip(reversed(runs[1:]), reversed(states[:-1]), strict=True):
            gradient = pulled(run, before, gradient)
        whole = states[0].taped()
        after = whole
        for run in runs[1:]:
            after = run(after)
        after.hidden.sum().backward()
    assert torch.allclose(gradient[0], whole.hidden.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_file_has_a_place_and_every_linear_a_spec(family, tmp_path):
    model = make_model(family)
    skeleton = open_skeleton(open_source(str(save(model, tmp_path))))
    placed = skeleton.others | {name: place for block in skeleton.blocks for name, place in block.tensors.items()}
    assert set(placed) == set(load_file(tmp_path / "model.safetensors"))
    state = model.state_dict()
    for block in skeleton.blocks:
        for spec in block.linears:
            weight = spec.placement.view(state[spec.placement.parameter])
            weight = weight.T if spec.transposed else weight
            assert tuple(weight.shape) == (spec.n, spec.k)
            stored = skeleton.read(f"{spec.name}.weight")
            assert torch.equal(stored.T if spec.transposed else stored, weight)


def test_experts_of_a_file_are_slices_of_the_models_stacks(tmp_path):
    skeleton = open_skeleton(open_source(str(save_family("mixtral", tmp_path))))
    prefix = "model.layers.1.block_sparse_moe.experts.3"
    assert place(skeleton.model, [f"{prefix}.w1.weight", f"{prefix}.w3.weight", f"{prefix}.w2.weight", "noise"]) == {
        f"{prefix}.w1.weight": Placement("model.layers.1.mlp.experts.gate_up_proj", 3, 0, 2),
        f"{prefix}.w3.weight": Placement("model.layers.1.mlp.experts.gate_up_proj", 3, 1, 2),
        f"{prefix}.w2.weight": Placement("model.layers.1.mlp.experts.down_proj", 3, 0, 1),
    }


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.v_proj.weight"])
def test_a_parameter_that_no_file_holds_is_named(tmp_path, name):
    tensors = load_file(save_family("llama", tmp_path) / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"1 weights that LlamaForCausalLM needs are in no file, the first '{name}'"
    ):
        open_skeleton(open_source(str(tmp_path)))


def test_a_shape_that_contradicts_the_configuration(tmp_path):
    changed_config(save_family("llama", tmp_path), lambda config: config.update(intermediate_size=128))
    with pytest.raises(CheckpointError, match=r"mlp\.\w+\.weight: .*96.* in the file, .*128.* in the model of config"):
        open_skeleton(open_source(str(tmp_path)))


def test_more_blocks_than_the_configuration_says_are_not_needed(tmp_path):
    changed_config(save_family("llama", tmp_path), lambda config: config.update(num_hidden_layers=1))
    assert len(open_skeleton(open_source(str(tmp_path))).blocks) == 1


def test_fewer_blocks_than_the_configuration_says(tmp_path):
    changed_config(save_family("llama", tmp_path), lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"the first 'model\.layers\.2\."):
        open_skeleton(open_source(str(tmp_path)))
