"""Tiny multimodal models with their processors: transformers' classes on a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from tests.builders import make_tokenizer, save
from tests.families.tiny import VOCABULARY, tiny_model

FIRST = VOCABULARY - 20  # the id of a tiny model's image token
PART = "{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}"
CHAT = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}" + PART + "{% endfor %}\n{% endfor %}"
SQUARE = {"height": 28, "width": 28}
RESIZED = {"size": SQUARE, "do_center_crop": False}

# Type -> its processor's class, that of its images with what it is given, the tokens from FIRST on with what the
# tokenizer calls them, what stands for an image in a text, and what the processor is given.
SEEING: dict[str, dict[str, Any]] = {
    "llava": {
        "processor": "LlavaProcessor",
        "images": ("CLIPImageProcessorPil", RESIZED),
        "tokens": {"image_token": "<image>"},
        "mark": "<image>",
        "given": {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    },
    "gemma3": {
        "processor": "Gemma3Processor",
        "images": ("Gemma3ImageProcessorPil", {"size": SQUARE}),
        "tokens": {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        "mark": "<boi>",
        "given": {"image_seq_length": 4},
    },
    "idefics3": {
        "processor": "Idefics3Processor",
        "images": ("Idefics3ImageProcessorPil", {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}}),
        "tokens": {"image_token": "<image>", "fake": "<fake_token_around_image>", "end": "<end_of_utterance>"},
        "mark": "<image>",
        "given": {"image_seq_len": 1},
    },
    "qwen2_5_vl": {
        "processor": "Qwen2_5_VLProcessor",
        "images": (
            "Qwen2VLImageProcessorPil",
            {"size": {"shortest_edge": 784, "longest_edge": 7056}, "temporal_patch_size": 1},
        ),
        "tokens": {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
        "mark": "<|vision_start|><|image_pad|><|vision_end|>",
        "given": {},
    },
}
# Qwen3-VL adds deep features of images behind its first two blocks.
SEEING["qwen3_vl"] = SEEING["qwen2_5_vl"] | {
    "processor": "Qwen3VLProcessor",
    "changes": {"text_config": {"num_hidden_layers": 3}},
}


def seeing_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The bytes' tokenizer with the type's tokens from FIRST on."""
    tokenizer = make_tokenizer()
    named = SEEING[kind]["tokens"]
    spare = [f"<spare {number}>" for number in range(FIRST - len(tokenizer))]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in [*spare, *named.values()]])
    tokenizer._set_model_specific_special_tokens(named)
    return tokenizer


def seeing_processor(kind: str) -> ProcessorMixin:
    """The type's own processor; one that takes videos too has nothing for them, which would need torchvision."""
    row = SEEING[kind]
    name, given = row["images"]
    own = getattr(transformers, row["processor"])
    without = type(own.__name__, (own,), {"check_argument_for_proper_class": lambda *_: None})
    return without(
        image_processor=getattr(transformers, name)(**given),
        tokenizer=seeing_tokenizer(kind),
        chat_template=CHAT.replace("MARK", row["mark"]),
        **row["given"],
    )


def save_seeing(kind: str, directory: Path) -> Path:
    """A tiny random model of a type and its processor saved in `directory`."""
    save(tiny_model(kind, **SEEING[kind].get("changes", {})), directory)
    processor = seeing_processor(kind)
    if not hasattr(processor, "video_processor"):
        processor.save_pretrained(directory)
        return directory
    processor.tokenizer._set_processor_class(SEEING[kind]["processor"])
    processor.tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
    return directory
