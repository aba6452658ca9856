"""Images of dataset rows, from local files or bytes in the row, within limits.

Rows are untrusted. URLs are never fetched. Only regular files of common formats are read, and images with too many
pixels are refused by their header, before they are decoded.
"""

import base64
import io
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps

from lowbit.calibrate.tables import BadRow
from lowbit.errors import CheckpointError
from lowbit.export.files import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow formats that need no other program
MOST_BYTES = 64 << 20  # of a file
MOST_PIXELS = 1 << 26  # 8192 by 8192
MOST_CHARS = 120  # of a name in messages
NAMES = ("path", "image", "url", "image_url")  # keys of an object with the path of an image


def open_picture(value: Any, home: Path) -> Image.Image:
    """The image of a cell or a part of a turn, in RGB, with its EXIF orientation applied. BadRow if there is none.

    value  a path, a `data:` URL, an object with either, or an object with the `bytes` of a file
    home   base directory of relative paths
    """
    content, name = _content(value, home)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about metadata
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:  # Pillow has a limit of its own
        raise BadRow(f"{name}: more than {MOST_PIXELS} pixels; make it smaller") from None
    except Exception as error:  # decoders raise many types on damaged files
        raise BadRow(f"{name}: damaged, or none of {', '.join(FORMATS)} ({type(error).__name__})") from error


def _content(value: Any, home: Path) -> tuple[bytes, str]:
    """The bytes of the image file, and its name for messages."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes) and value["bytes"]:
            return value["bytes"], "its image"
        named = next((value[key] for key in NAMES if value.get(key)), None)
        return _content(named if isinstance(named, str | dict) else None, home)
    if not isinstance(value, str) or not value:
        raise BadRow(f"its image is {type(value).__name__}, expected a file name or an object with bytes")
    scheme = value.partition(":")[0].lower()
    if scheme == "data":
        return _inline(value), "its image"
    if "://" in value and scheme != "file":
        raise BadRow(
            f"its image is at {value[:MOST_CHARS]!r}, and URLs are never fetched: save it and name the file, or pass "
            "--text-column to calibrate on the text alone"
        )
    path = home / (unquote(urlsplit(value).path) if scheme == "file" else value)
    try:
        return read_bytes(path, MOST_BYTES), str(value)[:MOST_CHARS]
    except FileNotFoundError:
        raise BadRow(f"no such image: {str(path)[:MOST_CHARS]}") from None
    except CheckpointError as error:
        raise BadRow(str(error)) from error


def _inline(address: str) -> bytes:
    """The bytes in a `data:` URL."""
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64") or len(body) > 2 * MOST_BYTES:
        raise BadRow("its image is a data: URL without base64, or too long")
    try:
        return base64.b64decode(body)
    except ValueError as error:
        raise BadRow(f"its image is a data: URL with invalid base64 ({error})") from error
