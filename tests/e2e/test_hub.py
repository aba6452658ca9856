"""Models of the hub: download, refusals with advice, resumption, quantization and upload, against tests/hub.py."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils.tqdm import enable_progress_bars

import lowbit
from lowbit.errors import CheckpointError, UsageError
from lowbit.export.checkpoint import sha256_of
from lowbit.export.snapshot import Snapshot, refuse_to_write_into
from lowbit.models.demo import BASE_MODEL
from lowbit.models.files import model_directory
from lowbit.models.source import open_source
from tests.builders import make_model, save
from tests.e2e.cli import Outcome, run_lowbit, run_quantize
from tests.hub import CUT_BYTES, ROUTES, TOKEN, Hub, serving

FAST = ("--method", "rtn", "--group-size", "32", "--eval-windows", "0")
LARGE = "model-00002-of-00004.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three files, with a card."""
    directory = save(make_model("llama"), tmp_path_factory.mktemp("model") / "tiny", torch.bfloat16, shard="60KB")
    (directory / "README.md").write_text("---\nlicense: llama3.2\nlanguage: en\n---\n# Tiny\n")
    return directory


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "hub" / "acme").mkdir(parents=True)
    (tmp_path / "hub" / "acme" / "tiny").symlink_to(model)
    with serving(tmp_path / "hub", monkeypatch, tmp_path / "cache") as hub:
        yield hub


def log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def complaint_of(name: str, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        model_directory(name, revision=revision)
    return str(caught.value)


def test_a_sharded_model_is_downloaded_once_and_quantized(hub, tmp_path) -> None:
    first = run_quantize("acme/tiny", *FAST, "-o", tmp_path / "out")
    assert first.code == 0, first.err
    recipe = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert recipe["model_commit"] == hub.commit("acme/tiny")
    assert hub.commit("acme/tiny") in (tmp_path / "out" / "README.md").read_text()
    hub.asked.clear()
    again = run_quantize("acme/tiny", *FAST, "-o", tmp_path / "again")
    assert again.code == 0, again.err
    assert not [path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path]


def test_a_line_says_what_is_downloaded_where_no_bar_does(hub, capsys, monkeypatch) -> None:
    bars = sys.modules["huggingface_hub.utils.tqdm"]  # the package has a class of that name
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    enable_progress_bars()
    model_directory("acme/tiny")
    [line] = capsys.readouterr().err.splitlines()  # and no bars
    size = sum(path.stat().st_size for path in hub.files("acme/tiny"))
    assert f"downloading acme/tiny at {hub.commit('acme/tiny')[:12]} from {hub.url}" in line
    assert f"{len(hub.files('acme/tiny'))} files, {size / 1e6:.1f} MB" in line


def test_a_revision_is_taken_and_the_files_know_their_commit(hub) -> None:
    source = open_source("acme/tiny", revision="v1")
    assert source.snapshot == Snapshot("acme/tiny", hub.commit("acme/tiny"))


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "perplexity", "acme/tiny", "--windows", "1"),
        ("inspect", "acme/tiny"),
        ("convert", "acme/tiny", "out", "--format", "gptq"),
        ("generate", "acme/tiny", "--prompt", "a"),
        ("bench", "acme/tiny"),
        ("report", "acme/tiny"),
        ("quantize", "acme/tiny", "--dry-run"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_a_revision(hub, command) -> None:
    assert "'acme/tiny' has no revision 'v2'; known: main, v1" in run_lowbit(*command, "--revision", "v2").complaint


def test_a_mirror_that_answers_strangely_is_told_in_a_line(hub, monkeypatch) -> None:
    [refs] = [pattern for pattern in ROUTES if pattern.endswith("/refs")]
    monkeypatch.setitem(ROUTES, refs, lambda handler, query, repo: handler.reply({}))
    assert "has no revision 'v2'; known: main" in complaint_of("acme/tiny", revision="v2")
    [tree] = [pattern for pattern in ROUTES if "/tree/" in pattern]
    monkeypatch.setitem(ROUTES, tree, lambda handler, query, repo, revision: handler.reply([{}]))
    [info] = [pattern for pattern in ROUTES if "/revision/" in pattern]
    monkeypatch.setitem(ROUTES, info, lambda handler, query, repo, revision: handler.reply({}))
    assert "downloading 'acme/tiny' failed" in complaint_of("acme/tiny", revision="v1")


def test_a_revision_is_of_a_hub_id_alone(model) -> None:
    with pytest.raises(UsageError, match="only those have revisions"):
        model_directory(str(model), revision="v1")


def test_a_gated_model_says_where_its_licence_is(hub, monkeypatch) -> None:
    hub.gated.add("acme/tiny")
    assert f"accept its licence at {hub.url}/acme/tiny, then log in with `hf auth login`" in complaint_of("acme/tiny")
    log_in(monkeypatch)
    assert "the account of your token has no access" in complaint_of("acme/tiny")


def test_an_unknown_model_and_a_private_one_are_one_to_a_stranger(hub, monkeypatch) -> None:
    assert "did you mean 'acme/tiny'?" in complaint_of("acme/tinny")
    hub.hidden.add("acme/tiny")
    assert "if it is private, log in with `hf auth login`, or set HF_TOKEN" in complaint_of("acme/tiny")
    log_in(monkeypatch)
    assert (model_directory("acme/tiny") / "config.json").exists()


def test_without_a_network_the_cache_serves_and_what_is_missing_has_a_cure(hub, monkeypatch) -> None:
    wanted = model_directory("acme/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_directory("acme/tiny") == wanted
    assert "run `hf download acme/other` where there is a network" in complaint_of("acme/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert model_directory("acme/tiny") == wanted
    assert "http://127.0.0.1:9 cannot be reached: check the network, the proxy" in complaint_of("acme/other")


def test_a_connection_that_breaks_is_gone_on_with(hub, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cuts[LARGE] = ["cut"]
    directory = model_directory("acme/tiny")
    assert (directory / LARGE).read_bytes() == (hub.root / "acme/tiny" / LARGE).read_bytes()
    assert [span for method, path, span in hub.asked if method == "GET" and path.endswith(LARGE)] == [
        None,
        f"bytes={CUT_BYTES}-",
    ]


def test_an_interrupted_download_keeps_the_files_that_came(hub, tmp_path) -> None:
    hub.cuts[LARGE] = ["broken"]
    assert "files that came whole are kept: the same command goes on from there" in complaint_of("acme/tiny")
    kept = {path.name for path in (tmp_path / "cache").glob("*/snapshots/*/*")}
    hub.asked.clear()
    assert {path.name for path in model_directory("acme/tiny").iterdir()} == {
        path.name for path in hub.files("acme/tiny")
    }
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}
    assert LARGE in fetched
    assert not fetched & kept


def test_a_path_is_no_hub_id(tmp_path, model) -> None:
    (tmp_path / "a.gguf").touch()
    assert "a file; a model is a directory" in complaint_of(str(model / "config.json"))
    assert "no GGUF that can be read" in complaint_of(str(tmp_path / "a.gguf"))
    assert "no such directory; did you mean 'tiny'?" in complaint_of(str(model.parent / "tinny"))


def test_what_others_own_is_not_written_into(hub, model, tmp_path) -> None:
    snapshot = model_directory("acme/tiny")
    for place, why in ((snapshot, "in the hub's cache"), (snapshot / "out", "hub's cache"), (model, "unquantized")):
        with pytest.raises(CheckpointError, match=why):
            refuse_to_write_into(place)
    refuse_to_write_into(tmp_path)
    stored = run_lowbit("eval", "perplexity", "acme/tiny", "--windows", "1", "--context", "16", "--record")
    assert "in the hub's cache" in stored.complaint
    assert "holds an unquantized model" in run_quantize("acme/tiny", *FAST, "-o", model, "--overwrite").complaint
    assert not (model / "evaluation.jsonl").exists()


@pytest.fixture
def made(hub, tmp_path) -> Path:
    lowbit.quantize("acme/tiny", tmp_path / "made", method="rtn", group_size=32, eval_windows=0)
    return tmp_path / "made"


def test_a_checkpoint_is_published_and_comes_back(hub, made, tmp_path, monkeypatch) -> None:
    log_in(monkeypatch)
    dry = run_lowbit("push", made, "acme/tiny-w4", "--dry-run")
    assert dry.code == 0, dry.err
    assert "private, new" in dry.out
    assert "not uploaded" in dry.out
    assert "acme/tiny-w4" not in hub.models()
    done = lowbit.push(made, "acme/tiny-w4")
    assert (done.created, done.private, hub.private["acme/tiny-w4"]) == (True, True, True)
    assert done.commit == hub.commit("acme/tiny-w4")
    back = open_source("acme/tiny-w4")
    assert {path.name for path in made.iterdir()} == {path.name for path in hub.files("acme/tiny-w4")}
    assert (back.directory / "SHA256SUMS").read_text() == (made / "SHA256SUMS").read_text()
    assert lowbit.inspect("acme/tiny-w4").bits_per_weight == lowbit.inspect(made).bits_per_weight
    assert not lowbit.push(made, "acme/tiny-w4", message="again").created


def test_the_hub_s_validator_takes_each_kind_of_card(hub, model, tmp_path) -> None:
    """Of a hub id, of a local download whose id the user names, and of one whose id nobody names."""
    ways: tuple[tuple[str | Path, str | None, str | None], ...] = (
        ("acme/tiny", None, "acme/tiny"),
        (model, "acme/named", "acme/named"),
        (model, None, None),
    )
    settings: dict[str, Any] = {"method": "rtn", "group_size": 32, "eval_windows": 1, "measures": ["kl"]}
    for number, (source, named, base) in enumerate(ways):
        lowbit.quantize(source, tmp_path / f"{number}", base_model=named, **settings)
        card = ModelCard.load(tmp_path / f"{number}" / "README.md")
        card.validate()
        assert (card.data.base_model, card.data.get("base_model_relation")) == (base, "quantized" if base else None)
        assert (card.data.license, card.data.language) == ("llama3.2", "en")
        assert [each.metric_type for each in card.data.eval_results or ()] == ["perplexity", "kl_divergence"]
    assert "--revision " + hub.commit("acme/tiny") in (tmp_path / "0" / "README.md").read_text()
    card.data.license = "A Licence of Ours"
    with pytest.raises(ValueError, match="license"):
        card.validate()


def test_a_run_publishes_what_it_made(hub, tmp_path, monkeypatch) -> None:
    refused = run_quantize("acme/tiny", *FAST, "-o", tmp_path / "out", "--push-to-hub", "acme/tiny-rtn")
    assert "needs an account: log in with `hf auth login`" in refused.complaint
    log_in(monkeypatch)
    for wrong, why in (("other/tiny", "who writes under acme"), ("tiny", "write NAME/MODEL")):
        assert why in run_quantize("acme/tiny", *FAST, "-o", tmp_path / "out", "--push-to-hub", wrong).complaint
    assert not (tmp_path / "out").exists()
    done: Outcome = run_quantize("acme/tiny", *FAST, "-o", tmp_path / "out", "--push-to-hub", "acme/tiny-rtn")
    assert done.code == 0, done.err
    assert f"{hub.url}/acme/tiny-rtn (private, new)" in done.out
    assert (hub.root / "acme/tiny-rtn/model.safetensors").exists()


def test_only_a_sound_quantized_checkpoint_is_published(hub, model, made, monkeypatch) -> None:
    log_in(monkeypatch)
    with pytest.raises(CheckpointError, match="not quantized"):
        lowbit.push(model, "acme/copy")
    with (made / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"x")
    with pytest.raises(CheckpointError, match="the file changed or is damaged"):
        lowbit.push(made, "acme/damaged")
    assert hub.models() == ["acme/tiny"]


def test_an_edited_card_is_published_with_its_sum(hub, made, monkeypatch) -> None:
    log_in(monkeypatch)
    with (made / "README.md").open("a") as card:
        card.write("More.\n")
    kept = (made / "SHA256SUMS").read_text()
    lowbit.push(made, "acme/edited", dry_run=True)
    assert (made / "SHA256SUMS").read_text() == kept
    lowbit.push(made, "acme/edited")
    sums = (hub.root / "acme/edited/SHA256SUMS").read_text()
    assert f"{sha256_of(made / 'README.md')}  README.md" in sums


def test_another_commit_than_the_recipes_is_told(hub, made, tmp_path) -> None:
    recipe = made / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(hub.commit("acme/tiny"), "0" * 40))
    told = run_quantize("acme/tiny", "--recipe", recipe, "--dry-run")
    assert told.code == 0
    assert f"made with commit {'0' * 40}" in told.err


def test_the_demo_is_the_publishers_if_the_hub_answers_and_the_wheels_otherwise(hub, model, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "lowbit"))
    monkeypatch.setattr("lowbit.models.files.demo_model_dir", lambda: model)
    assert open_source("demo").snapshot is None
    (hub.root / "HuggingFaceTB").mkdir()
    (hub.root / BASE_MODEL).symlink_to(save(make_model("llama"), tmp_path / "published"))
    found = open_source("demo")
    assert found.snapshot == Snapshot(BASE_MODEL, hub.commit(BASE_MODEL))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source("demo").directory == found.directory
