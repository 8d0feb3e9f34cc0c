"""What a model made, saved beside its activations: one small file for each row of prompts.jsonl.

    images/0.webp     an image, or a video as an animation
    images/0.wav      audio

`save_images` writes them, `image_path` finds the one of a row, and `images_checksum` tells whether
they are still as they were written.
"""

import io
import os
import wave
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from errors import UsageError
from store.disk import opened, sync_folder, write_all

SUFFIXES = (".webp", ".wav")
QUALITY = 90  # of lossy WebP; 100 is the best
FRAME_MS = 125  # how long a frame of a video is shown; pipelines do not say their frame rate
SAMPLING_RATE = 44100  # audio samples per second, if the pipeline does not say it


def image_path(folder: Path, row: int) -> Path | None:
    """Return the file that shows, or sounds like, one row of prompts.jsonl; None without one."""
    for suffix in SUFFIXES:
        path = Path(folder) / f"{row}{suffix}"
        if path.exists():
            return path
    return None


def save_images(
    output: object, folder: Path, rows: range, sampling_rate: int = SAMPLING_RATE
) -> None:
    """Save what a pipeline returned for these rows, and return once it is safe on the disk.

    output: a list of PIL images, or of lists of them (videos); images in [0, 1], (N, C, H, W) of
    torch or (N, H, W, C) of NumPy; videos, with an axis of frames behind N; or an object with
    `images`, `frames` or `audios` that is one of these. audios: (N, samples) or (N, channels,
    samples) in [-1, 1]. Files of rows that were saved before are overwritten.

    Raises UsageError for anything else, and if there is not one for each row.
    """
    is_audio = hasattr(output, "audios")
    made = output
    for name in ("images", "frames", "audios"):
        if hasattr(output, name):
            made = getattr(output, name)
            break
    if not isinstance(made, (list, torch.Tensor, np.ndarray)):
        raise UsageError(
            f"a {type(output).__name__} can't be saved as images: collect with --no_save_images"
        )
    if len(made) != len(rows):
        raise UsageError(
            f"the pipeline made {len(made)} images for {len(rows)} rows; collect one image a prompt"
        )

    folder.mkdir(parents=True, exist_ok=True)
    for row, x in zip(rows, made):
        if is_audio:
            path = folder / f"{row}.wav"
            data = encode_audio(x, sampling_rate)
        else:
            path = folder / f"{row}.webp"
            data = encode_frames(x)
        with opened(path, os.O_CREAT | os.O_TRUNC) as fd:
            write_all(fd, data, 0)
    sync_folder(folder)


def images_checksum(folder: Path, rows: range) -> int:
    """Return the CRC-32 of the files of some rows, with their numbers and lengths.

    A missing file counts as an empty one.
    """
    crc = 0
    for row in rows:
        path = image_path(folder, row)
        data = b"" if path is None else path.read_bytes()
        crc = zlib.crc32(f"{row} {len(data)}".encode(), crc)
        crc = zlib.crc32(data, crc)
    return crc


def remove_images(folder: Path, first: int = 0) -> None:
    """Remove the files of the row `first` and of all rows behind it."""
    for path in folder.glob("*.w*"):
        is_ours = path.suffix in SUFFIXES and path.stem.isdecimal()
        if is_ours and int(path.stem) >= first:
            path.unlink()


def encode_frames(x: object) -> bytes:
    """Return an image, or the frames of a video, as the bytes of a WebP file.

    x: a PIL image, a list of them, or an array as `to_bytes` takes it.
    """
    if isinstance(x, Image.Image):
        frames = [x]
    elif isinstance(x, list) and all(isinstance(frame, Image.Image) for frame in x):
        frames = x
    else:
        frames = [Image.fromarray(frame) for frame in to_bytes(x)]
    first, *others = frames
    file = io.BytesIO()
    if others:
        first.save(
            file,
            "webp",
            quality=QUALITY,
            save_all=True,
            append_images=others,
            duration=FRAME_MS,
        )
    else:
        first.save(file, "webp", quality=QUALITY)
    return file.getvalue()


def to_bytes(x: object) -> np.ndarray:
    """Return the frames of an image or a video as uint8: (F, H, W, 3), or 4 with transparency.

    x: numbers in [0, 1], or uint8 of NumPy. torch has the channels in front of the height and the
    width, NumPy behind them: (3, H, W) of torch gives (1, H, W, 3). One channel becomes three.
    Raises UsageError for another shape.
    """
    if torch.is_tensor(x):
        if x.ndim in (3, 4):
            x = x.movedim(-3, -1).float()
        x = x.cpu().numpy()
    x = np.asarray(x)
    if x.ndim not in (3, 4) or x.shape[-1] not in (1, 3, 4):
        raise UsageError(
            f"an array of shape {x.shape} can't be saved as an image: collect with --no_save_images"
        )
    if x.dtype != np.uint8:
        levels = np.nan_to_num(x.astype(np.float32)).clip(0, 1) * 255
        x = levels.round().astype(np.uint8)
    if x.shape[-1] == 1:
        x = x.repeat(3, -1)
    return x[None] if x.ndim == 3 else x


def encode_audio(x: object, sampling_rate: int) -> bytes:
    """Return audio in [-1, 1], (samples,) or (channels, samples), as a WAV file of 16 bits."""
    if torch.is_tensor(x):
        x = x.float().cpu().numpy()
    x = np.atleast_2d(np.nan_to_num(np.asarray(x, np.float32)))
    levels = (x.clip(-1, 1) * 32767).round().astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(len(levels))
        out.setsampwidth(2)
        out.setframerate(sampling_rate)
        out.writeframes(levels.T.tobytes())
    return file.getvalue()


def sampling_rate_of(pipe: object) -> int:
    """Return how many audio samples per second a pipeline makes, as one of its parts says."""
    for name in ("vocoder", "vae", "unet"):
        config = getattr(getattr(pipe, name, None), "config", None)
        rate = getattr(config, "sampling_rate", None) or getattr(config, "sample_rate", None)
        if rate:
            return int(rate)
    return SAMPLING_RATE
