"""lowbit/arguments.py, and errors of the public functions for arguments of a wrong type."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.arguments import typed
from lowbit.engine.engine import Engine
from lowbit.errors import DeviceError, EngineError, LowbitError, RecipeError, UsageError
from lowbit.models.devices import check_device
from tests.builders import save_family


@typed(EngineError)
def called(one: int | Path, *rest: str, many: Sequence[int] = (), **others: Any) -> str:
    """The arguments of the call."""
    return f"{one} {rest} {many} {others}"


def test_right_types_pass() -> None:
    assert called(5, "a", "b", many=[1], x=None) == "5 ('a', 'b') [1] {'x': None}"
    assert called(one=Path("x")) == "x () () {}"
    assert called.__doc__ == "The arguments of the call."


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        (("5",), {}, "one is '5': int | Path is needed"),
        ((5, "a", 6), {}, "rest is 6: str is needed"),
        ((5,), {"many": [1, 2.5]}, r"many is \[1, 2.5\]: Sequence\[int\] is needed"),
        ((["x" * 1000],), {}, "one is .{60}: int"),
    ],
)
def test_wrong_types_are_a_line(args: tuple[Any, ...], kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(EngineError, match=f"^{told}"):
        called(*args, **kwargs)


def test_a_call_that_fits_no_signature_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing a required argument"):
        called()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("llama") / "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return lowbit.load(model, device="cpu")


@pytest.mark.parametrize("prompt", [5, None, [5.5], [[1.5]], ["a", 5], [None], [["a"]], {"a": 1}, [], "", [[]]])
def test_prompts_of_no_kind(engine: Engine, prompt: Any) -> None:
    with pytest.raises(EngineError, match=r"^(prompts is .*is needed|no prompt|the prompt is empty)"):
        engine.generate(prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_new_tokens", "5"), ("temperature", "x"), ("top_k", 1.5), ("top_p", None), ("beams", 2.5)),
        *(("stop", "x"), ("stop", [5]), ("stop_tokens", ["a"]), ("bad_words", [5]), ("bad_words", [[1.5]])),
        *(("seed", "1"), ("ignore_eos", "no"), ("prompt_logprobs", 5), ("length_penalty", "x"), ("lookup", 1.5)),
    ],
)
def test_settings_of_no_kind(engine: Engine, name: str, value: Any) -> None:
    with pytest.raises(EngineError, match=f"^{name} is .* needed$"):
        engine.generate("a", **{name: value})


def test_settings_that_people_pass_are_taken(engine: Engine) -> None:
    engine.generate("a", max_new_tokens=1, temperature=1, stop=["x"], stop_tokens=[5], bad_words=["b", [5]], seed=0)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda engine: engine.encode(5), "text is 5: str"),
        (lambda engine: engine.chat("hello"), "messages is 'hello'"),
        (lambda engine: engine.chat([5]), r"messages is \[5\]"),
        (lambda engine: engine.logits(torch.rand(1, 3)), "not torch.float32 of shape"),
        (lambda engine: engine.logits(torch.tensor([1, 2])), r"not torch.int64 of shape \[2\]"),
    ],
)
def test_other_calls_of_the_engine(engine: Engine, call: Any, told: str) -> None:
    with pytest.raises(EngineError, match=told):
        call(engine)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *(("name", None, UsageError), ("dtype", "float16", UsageError), ("dtype", torch.int8, UsageError)),
        *(("context", "12", UsageError), ("cache", 3, UsageError), ("head", 7, UsageError), ("device", 5, UsageError)),
        *(("device", "mps", DeviceError), ("device", "meta", DeviceError), ("device", "abacus", DeviceError)),
    ],
)
def test_what_a_model_is_loaded_with(model: Path, name: str, value: Any, kind: type[LowbitError]) -> None:
    with pytest.raises(kind, match=name):
        lowbit.load(**{"name": model, "device": "cpu", name: value})


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *(("model", 5, UsageError), ("output", 5, UsageError), ("recipe", 5, UsageError), ("measures", 5, UsageError)),
        *(("eval_windows", "x", UsageError), ("overwrite", "yes", UsageError), ("device", "mps", DeviceError)),
        *(("method", 5, RecipeError), ("bits", "4", RecipeError), ("ignore", "lm_head", RecipeError)),
        *(("ignore", ["re:*x"], RecipeError), ("seed", -1, RecipeError), ("dataset", 5, RecipeError)),
    ],
)
def test_what_is_quantized(model: Path, name: str, value: Any, kind: type[LowbitError]) -> None:
    with pytest.raises(kind, match=name):
        lowbit.quantize(**{"model": model, "method": "int8", "dry_run": True, name: value})


@pytest.mark.parametrize("device", ["mps", "meta", "xpu:0"])
def test_devices_that_nothing_computes_on(device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}': .* is not supported"):
        check_device(device)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == "cuda:1"
    with pytest.raises(DeviceError, match="device 'cuda:2': there are 2 GPUs, counted from cuda:0"):
        check_device("cuda:2")


def test_other_functions(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="checkpoint is 5"):
        lowbit.inspect(5)
    with pytest.raises(UsageError, match="checkpoints is 5"):
        lowbit.report(5)
    with pytest.raises(UsageError, match="format is 5"):
        lowbit.convert(model, tmp_path / "out", format=5)
