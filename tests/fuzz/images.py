"""Damaged images beside a chat: bytes turned, cut and swapped in files of every format that is read."""

import io
import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from lowbit.calibrate.data import calibration_tokens
from lowbit.calibrate.pictures import FORMATS
from lowbit.models.source import open_source
from tests.families.seeing import save_seeing
from tests.fuzz.documents import turned

Files = dict[str, bytes]
PICTURE, ROWS = "picture", "rows.jsonl"
ROTATED = 0x0112, 6  # EXIF's orientation


def models(base: Path) -> dict[str, Path]:
    """A model that sees, with a chat about an image."""
    directory = save_seeing("llava", base / "llava")
    (directory / PICTURE).write_bytes(_pictures()[0])
    content = [{"type": "image", "path": PICTURE}, {"type": "text", "text": "What is it?"}]
    (directory / ROWS).write_text(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    return {"llava": directory}


def _pictures() -> list[bytes]:
    """One small image in each format, and a few of unusual modes."""
    pixels = np.random.default_rng(0).integers(0, 255, (21, 33, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[ROTATED[0]] = ROTATED[1]
    found = []
    for kind, mode in [*((kind, "RGB") for kind in FORMATS), ("JPEG", "CMYK"), ("PNG", "I;16"), ("PNG", "P")]:
        file = io.BytesIO()
        made = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
        made.save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        found.append(file.getvalue())
    return found


def files(honest: Path) -> st.SearchStrategy[Files]:
    """A damaged image in the place of the honest one."""
    return st.sampled_from(_pictures()).flatmap(turned).map(lambda content: {PICTURE: content})


def read(place: Path) -> None:
    """The chat as a sample to calibrate on."""
    source = open_source(str(place))
    found = calibration_tokens(str(place / ROWS), source.tokenizer(), 1, 64, 0, eyes=source)
    assert len(found.seen) == 1
