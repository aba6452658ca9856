"""calibrate/discover.py and structure.py on every family: the folds found are the ones that theory allows, and a wrong
one is dropped. calibrate/heads.py: so do the heads that can be rotated. calibrate/block.py: both applied without
rounding leave the logits what they were."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.calibrate.block import BlockWork
from lowbit.calibrate.discover import Workbench, prove
from lowbit.calibrate.search import searches
from lowbit.calibrate.structure import Prober
from lowbit.calibrate.transforms import Awq
from lowbit.models.skeleton import Skeleton, open_skeleton
from lowbit.models.source import open_source
from lowbit.models.walk import Walk
from lowbit.quant.scheme import make_scheme
from lowbit.quant.site import Fold
from tests.builders import FAMILIES, UNUSUAL, calibration, logits_of, make_model, save, save_family

GATED_NORMS = {"input_layernorm": "q_proj k_proj v_proj", "post_attention_layernorm": "gate_proj up_proj"}
VALUES = {"self_attn.v_proj": "o_proj"}
UP = {"mlp.up_proj": "down_proj"}
LLAMA = GATED_NORMS | VALUES | UP
GEMMA = {"input_layernorm": "q_proj k_proj v_proj", "pre_feedforward_layernorm": "gate_proj up_proj"} | VALUES | UP


def experts(prefix: str, router: str, gate: str, up: str, down: str) -> dict[str, str]:
    """The folds of four experts: one norm feeds all of them and their router, and each feeds itself."""
    reads = " ".join([router, *[f"{prefix}.{i}.{name}" for i in range(4) for name in (gate, up)]])
    return {"post_attention_layernorm": reads} | {f"{prefix}.{i}.{up}": f"{prefix}.{i}.{down}" for i in range(4)}


# Family -> producer -> consumers, the last parts of their names. ReLU lets a scale through, GELU does not: only OPT's
# first linear feeds its second. Falcon's and NeoX's fused projections feed their outputs with their value rows alone.
FOLDS: dict[str, dict[str, str]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi3": {
        "input_layernorm": "qkv_proj",
        "post_attention_layernorm": "gate_up_proj",
        "self_attn.qkv_proj": "o_proj",
        "mlp.gate_up_proj": "down_proj",
    },
    "gpt2": {"ln_1": "c_attn", "ln_2": "c_fc", "attn.c_attn": "c_proj"},
    "gpt_neox": {
        "input_layernorm": "query_key_value",
        "post_attention_layernorm": "dense_h_to_4h",
        "attention.query_key_value": "dense",
    },
    "opt": {
        "self_attn_layer_norm": "q_proj k_proj v_proj",
        "self_attn.v_proj": "out_proj",
        "final_layer_norm": "fc1",
        "fc1": "fc2",
    },
    "falcon_7b": {
        "input_layernorm": "query_key_value dense_h_to_4h",
        "self_attention.query_key_value": "dense",
    },
    "falcon_40b": {
        "ln_attn": "query_key_value",
        "ln_mlp": "dense_h_to_4h",
        "self_attention.query_key_value": "dense",
    },
    "mixtral": {"input_layernorm": GATED_NORMS["input_layernorm"]}
    | VALUES
    | experts("block_sparse_moe.experts", "block_sparse_moe.gate", "w1", "w3", "w2"),
    "qwen3_moe": {"input_layernorm": GATED_NORMS["input_layernorm"]}
    | VALUES
    | experts("mlp.experts", "mlp.gate", "gate_proj", "up_proj", "down_proj"),
}
OFFSETS = {"gemma2": 1.0, "gemma3": 1.0}
# Heads whose values can be rotated: number of key-value heads, and their size.
HEADS = dict.fromkeys(FAMILIES, (2, 16)) | dict.fromkeys(("gpt2", "gpt_neox", "opt"), (4, 16)) | {"falcon_7b": (1, 16)}


def skeleton_of(directory: Path) -> Skeleton:
    return open_skeleton(open_source(str(directory)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> its tiny model and the skeleton of what was saved of it; made once each."""
    made: dict[str, tuple[torch.nn.Module, Skeleton]] = {}

    def model_of(family: str) -> tuple[torch.nn.Module, Skeleton]:
        if family not in made:
            model = make_model(family)
            made[family] = model, skeleton_of(save(model, tmp_path_factory.mktemp(family)))
        return made[family]

    return model_of


def short(fold: Fold, block: str) -> tuple[str, str]:
    consumers = [name.removeprefix(f"{block}.") for name in fold.columns]
    if not any(".experts." in name for name in consumers):
        consumers = [name.rpartition(".")[2] for name in consumers]
    return fold.producer.removeprefix(f"{block}."), " ".join(sorted(consumers))


def prober_of(skeleton: Skeleton, seed: int = 3) -> tuple[Walk, Prober]:
    walk = Walk(skeleton, "cpu", torch.float32)
    return walk, Prober(walk, calibration(seed=seed).ids, seed)


def test_every_family_is_here():
    assert set(FOLDS) == set(FAMILIES)


def test_the_rows_of_a_wide_layer_are_told_apart(tmp_path):
    """With 14336 rows the factors crowd, and none of them may pass for no change at all."""
    skeleton = open_skeleton(open_source(str(save_family("llama", tmp_path / "wide", intermediate_size=14336))))
    walk, prober = prober_of(skeleton)
    with walk.loaded(0):
        folds = prober.structure(0).folds
    assert ("mlp.up_proj", "down_proj") in {short(fold, skeleton.blocks[0].name) for fold in folds}
    assert len(folds) == len(FOLDS["llama"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folds_of_a_family(models, family):
    skeleton = models(family)[1]
    walk, prober = prober_of(skeleton)
    wanted = {producer: " ".join(sorted(names.split())) for producer, names in FOLDS[family].items()}
    for index, block in enumerate(skeleton.blocks):
        with walk.loaded(index):
            structure = prober.structure(index)
            (heads,) = prober.heads(index, structure)
        assert tuple(heads.channels.shape) == HEADS[family]
        assert dict(short(fold, block.name) for fold in structure.folds) == wanted
        assert len(structure.folds) == len(wanted)
        assert structure.unreached == structure.rejected == []
        for fold in structure.folds:
            if fold.is_linear:
                assert fold.offset == 0
            else:
                assert fold.offset == OFFSETS.get(family, 0)
        reading = [name for site in structure.sites for name in site.linears]
        assert sorted(reading) == sorted(spec.name for spec in block.linears)


def test_grouped_query_attention_maps_heads_to_the_heads_they_share(models):
    """4 query heads of 16 over 2 key-value heads: columns 0-15 and 16-31 of o read rows 0-15 of v."""
    walk, prober = prober_of(models("llama")[1])
    with walk.loaded(0):
        fold = next(fold for fold in prober.structure(0).folds if fold.producer.endswith("v_proj"))
    first, second = torch.arange(16), torch.arange(16, 32)
    assert fold.channels == 32
    assert torch.equal(next(iter(fold.columns.values())), torch.cat([first, first, second, second]))


@pytest.mark.parametrize(
    ("family", "producer", "rows"),
    [
        ("phi3", "qkv_proj", torch.arange(96, 128).view(2, 1, 16).expand(2, 2, 16).flatten()),  # 64 q, 32 k, 32 v
        ("phi3", "gate_up_proj", torch.arange(96, 192)),
        ("gpt2", "c_attn", torch.arange(128, 192)),
        ("gpt_neox", "query_key_value", torch.arange(192).view(4, 3, 16)[:, 2].flatten()),  # q, k, v head by head
        ("falcon_7b", "query_key_value", torch.arange(80, 96).repeat(4)),  # one value head for all
        # two groups of two query heads, a key head and a value head
        ("falcon_40b", "query_key_value", torch.arange(128).view(2, 4, 16)[:, 3].repeat_interleave(2, 0).flatten()),
    ],
)
def test_rows_of_fused_projections(models, family, producer, rows):
    walk, prober = prober_of(models(family)[1])
    with walk.loaded(0):
        fold = next(fold for fold in prober.structure(0).folds if fold.producer.endswith(producer))
    assert torch.equal(next(iter(fold.columns.values())), rows)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_found_does_not_hang_on_the_seed(models, seed):
    skeleton = models("qwen3_moe")[1]
    walk, prober = prober_of(skeleton, seed)
    with walk.loaded(0):
        folds = prober.structure(0).folds
    assert {short(fold, skeleton.blocks[0].name)[0] for fold in folds} == set(FOLDS["qwen3_moe"])


def wrong_folds(good: dict[str, Fold]) -> dict[str, Fold]:
    """Folds that look right and are not: each moves a scale that does change the block."""
    norm, values, up = good["input_layernorm"], good["self_attn.v_proj"], good["mlp.up_proj"]
    names = list(norm.columns)
    columns = next(iter(values.columns.values()))
    return {
        "a consumer forgotten": replace(norm, columns={name: norm.columns[name] for name in names[:-1]}),
        "the wrong offset": replace(norm, offset=1.0 - norm.offset),
        "the wrong norm": replace(norm, producer=good["post_attention_layernorm"].producer),
        "heads in another order": replace(values, columns={name: columns.flip(0) for name in values.columns}),
        "the gate instead of up": replace(up, producer=up.producer.replace("up_proj", "gate_proj")),
        "keys instead of values": replace(values, producer=values.producer.replace("v_proj", "k_proj")),
        "two channels swapped": replace(up, columns={name: swapped(value) for name, value in up.columns.items()}),
    }


def swapped(columns: torch.Tensor) -> torch.Tensor:
    columns = columns.clone()
    columns[[5, 6]] = columns[[6, 5]]
    return columns


def test_a_wrong_fold_fails_its_proof_and_right_ones_stay(models):
    skeleton = models("llama")[1]
    walk, prober = prober_of(skeleton)
    block = skeleton.blocks[0]
    with walk.loaded(0):
        folds = prober.structure(0).folds
        bench = Workbench(block)
        before = [parameter.clone() for parameter in bench.module.parameters()]
        probe = prober._probes(0)[0]
        good = {fold.producer.removeprefix(f"{block.name}."): fold for fold in folds}
        for what, fold in wrong_folds(good).items():
            assert prove(bench, [fold], probe, seed=1) == [], what
            assert prove(bench, [*folds, fold], probe, seed=1) == folds, what
        assert prove(bench, folds, probe, seed=1) == folds
        assert all(torch.equal(a, b) for a, b in zip(before, bench.module.parameters(), strict=True))


def test_what_one_block_showed_is_renamed_and_proved_on_the_next(tmp_path):
    model = make_model("llama")
    skeleton = skeleton_of(save(model, tmp_path))
    walk, prober = prober_of(skeleton)
    with walk.loaded(0):
        first = prober.structure(0)
    with walk.loaded(1):
        second = prober.structure(1)
    assert [fold.producer.replace(".0.", ".1.", 1) for fold in first.folds] == [fold.producer for fold in second.folds]
    assert all(".layers.1." in name for fold in second.folds for name in fold.columns)


def logits_with_folds(skeleton: Skeleton, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits after heads were rotated, every fold's searched scale was applied and nothing was rounded; and how many
    scales there were."""
    walk, prober = prober_of(skeleton)
    batches = walk.start([ids])
    scaled = 0
    for index, block in enumerate(skeleton.blocks):
        with walk.loaded(index), torch.no_grad():
            structure = prober.structure(index)
            schemes = {s.name: make_scheme(4, 32, True).fitting([(s.n, s.k)]) for s in block.linears}
            work = BlockWork(walk, index, schemes, torch.float32)
            for heads in prober.heads(index, structure):
                work.rotate(heads)
            work.observe(batches, structure.sites, 1 << 20)
            for search in searches(work, structure.folds, batches):
                choices = [] if search.reason_against() else Awq().choose(search)
                search.apply([choice.scales for choice in choices] or [None] * len(search.folds))
                scaled += sum(choice.scales is not None for choice in choices)
            batches = work.run(batches)
    return torch.cat(list(walk.logits([ids], batches))), scaled


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL, "gemma4", "gemma3n"])
def test_folds_without_rounding_leave_the_logits(models, family):
    model, skeleton = models(family)
    ids = calibration(16, 24).ids  # an expert that sees too few is left out
    wanted = logits_of(model, ids)
    got, scaled = logits_with_folds(skeleton, ids)
    assert scaled >= len(FOLDS.get(family, "some"))  # of twice as many: some may be best left alone
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stacked_on_disk_have_the_same_folds(tmp_path, family):
    model = make_model(family)
    save(model, tmp_path)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    skeleton = skeleton_of(tmp_path)
    names = [spec.name for spec in skeleton.blocks[1].linears if ".experts." in spec.name]
    parts = FOLDS[family]["post_attention_layernorm"].split()[1:] + [
        consumer for producer, consumer in FOLDS[family].items() if ".experts." in producer
    ]
    alone = [f"model.layers.1.{name}".replace("block_sparse_moe", "mlp") for name in parts]
    assert sorted(names) == sorted(alone)
    ids = calibration(16, 24).ids  # an expert that sees too few is left out
    got, scaled = logits_with_folds(skeleton, ids)
    assert scaled >= len(FOLDS[family])
    torch.testing.assert_close(got, logits_of(model, ids), rtol=1e-4, atol=1e-3)


def test_more_experts_take_no_more_runs(tmp_path, monkeypatch):
    """One is searched, and one run proves what was found there in all others. Of 96, most see no probe token: these
    are not searched either."""
    runs, inputs = [], Workbench.inputs
    monkeypatch.setattr(Workbench, "inputs", lambda bench, probe: runs.append(probe) or inputs(bench, probe))
    counts = []
    for count in (4, 12, 96):
        skeleton = skeleton_of(save_family("qwen3_moe", tmp_path / str(count), num_experts=count))
        walk, prober = prober_of(skeleton)
        with walk.loaded(0):
            structure = prober.structure(0)
        assert len(structure.folds) == 3 + count
        counts.append(len(runs))
        runs.clear()
    assert max(counts) - min(counts) < 8


def test_an_expert_whose_copy_fails_its_proof_is_searched(models, monkeypatch):
    monkeypatch.setattr("lowbit.calibrate.discover.prove", lambda bench, folds, probe, seed: [])
    skeleton = models("mixtral")[1]
    walk, prober = prober_of(skeleton)
    with walk.loaded(0):
        found = dict(short(fold, skeleton.blocks[0].name) for fold in prober.structure(0).folds)
    assert found.keys() == FOLDS["mixtral"].keys()
