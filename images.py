"""Opening an image: the one way from a file or a data URL to 8-bit RGB, for every model and command.

    image = open_image("photo.jpg")        # PIL, mode RGB, upright, on white
    image = open_image("data:image/png;base64,iVBOR...")

What a viewer shows is what a model sees: EXIF orientation is applied, a transparent ground becomes white, and
numbers of more than 8 bits are scaled by their range instead of clipped. 8-bit RGB passes through untouched,
so the models' own resizing stays bit-equal to the originals'.
"""

import base64
import binascii
import contextlib
import io
import os
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # PIL's own warning threshold; a larger image is refused before it is decoded
# Raster formats alone: of the others PIL hands some (PostScript) to programs that interpret them
FORMATS = tuple("PNG JPEG MPO WEBP GIF BMP DIB TIFF PPM JPEG2000 AVIF ICO TGA QOI".split())
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.I)


def is_data_url(source: str) -> bool:
    return source[:5].lower() == "data:"


def short(source: str, limit: int = 200) -> str:
    """`source` for a message: a data URL's first characters, a long path's two ends."""
    if is_data_url(source):
        return f"{source[:32]}... ({len(source):,} characters)" if len(source) > 48 else source
    return source if len(source) <= limit else f"{source[: limit // 2]}...{source[-limit // 2 :]}"


def read_bytes(source: str) -> bytes:
    """The encoded image: a file's content or a data URL's payload. ValueError or OSError if there is none."""
    if is_data_url(source):
        match = DATA_URL.match(source)
        if match is None or not match[3] or (match[1] and not match[1].lower().startswith("image/")):
            raise ValueError("a data URL must read data:image/TYPE;base64,DATA")
        try:
            return base64.b64decode("".join(source[match.end() :].split()), validate=True)
        except binascii.Error as e:
            raise ValueError(f"the data URL's base64 is damaged ({e})") from None
    if os.path.exists(source) and not os.path.isfile(source):
        raise ValueError("not a regular file")  # a pipe would block for ever
    with open(source, "rb") as file:
        return file.read()


def readable(formats: tuple[str, ...]) -> list[str]:
    """Those that this Pillow has a decoder for; it stops at the first one that it lacks, whatever follows."""
    Image.init()
    return [name for name in formats if name in Image.OPEN]


def open_image(source: str | os.PathLike) -> Image.Image:
    """An image file or data URL as 8-bit RGB. ValueError naming it for anything that is no whole image of
    sane size.

    Of an animation the first frame is taken.
    """
    source = os.fspath(source)
    try:
        with Image.open(io.BytesIO(read_bytes(source)), formats=readable(FORMATS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are opened")
            image.load()
            wide = image.mode.startswith("I") or image.mode == "F"
            return rgb(upright(eight_bits(image) if wide else image))
    except FileNotFoundError:
        raise ValueError(f"{short(source)}: no such image") from None
    except Exception as e:  # decoders raise errors of every kind on damaged data
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        if isinstance(e, UnidentifiedImageError):  # which names an object in memory
            reason = "of no known format"
        raise ValueError(
            f"{short(source)}: not a readable image ({reason}); replace it or remove its records"
        ) from None


def image_size(source: str | os.PathLike) -> tuple[int, int]:
    """(width, height) as open_image would give it, from the header alone where that says it. ValueError as
    there."""
    with contextlib.suppress(Exception):  # open_image says what is wrong
        if not is_data_url(source) and os.path.isfile(source):
            with Image.open(source, formats=readable(FORMATS)) as image:
                # On its side by EXIF: of a TIFF, but of no other format, Pillow has turned the size already.
                if image.getexif().get(0x0112, 1) not in (5, 6, 7, 8):
                    return image.size
    return open_image(source).size


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; damaged EXIF data says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey numbers of 16 or 32 bits or floats, scaled by their range: that of the 16-bit format; of numbers
    that say nothing themselves 0..1 (floats), 0..255 or 0..65535 if they lie within, else from their least to
    their largest. Of these Pillow heeds neither a TIFF's sign and white zero nor a transparent number."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    if image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinity among its pixels")
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        low, high = 0, 4095 if tags.get(258) == (12,) else 65535
    else:
        ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        if low >= 0 and high <= ranges[-1]:
            low, high = 0, next(limit for limit in ranges if high <= limit)
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    if tags.get(262) == 0:  # its zero is white
        scaled = 255 - scaled
    grey, about = Image.fromarray(np.rint(scaled).astype(np.uint8)), {**image.info}
    if (clear := about.pop("transparency", None)) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    grey.info = about  # the orientation is in it
    return grey


def is_constant(image: Image.Image) -> bool:
    """One colour throughout: almost always a failed download or a wrong conversion."""
    return all(low == high for low, high in image.getextrema())
