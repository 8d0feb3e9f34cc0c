"""What a model made, saved beside its activations: one small file for each row of prompts.jsonl.

images/0.webp     an image, or a video as an animation
images/0.wav      audio
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
QUALITY = 90  # of lossy WebP, of 100
FRAME_MS = 125  # a frame of a video: pipelines do not say how many there are per second


def image_path(folder: Path, row: int) -> Path | None:
    """The file that shows (or sounds like) one row of prompts.jsonl; None where there is none."""
    paths = [Path(folder) / f"{row}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.exists()), None)


def save_images(output: object, folder: Path, rows: range, sampling_rate: int = 44100) -> None:
    """Save what a pipeline returned for these rows, and return once it is safe on the disk.

    output: a list of PIL images, or of lists of them; images in [0, 1] (N, C, H, W) of torch or (N,
    H, W, C) of NumPy; videos with an axis of frames before these; an object with `images`, `frames`
    or `audios` that is one of these. audios: (N, samples) or (N, channels, samples) in [-1, 1].
    Files of rows that were saved before are overwritten.

    Raises UsageError for anything else, and where there is not one for each row.
    """
    audio = hasattr(output, "audios")
    found = next(
        (getattr(output, name) for name in ("images", "frames", "audios") if hasattr(output, name)),
        output,
    )
    if not isinstance(found, (list, torch.Tensor, np.ndarray)):
        raise UsageError(
            f"a {type(output).__name__} can't be saved as images: collect with --no_save_images"
        )
    if len(found) != len(rows):
        raise UsageError(
            f"the pipeline made {len(found)} images for {len(rows)} rows; collect one image a prompt"
        )

    folder.mkdir(parents=True, exist_ok=True)
    for row, one in zip(rows, found):
        data = encode_audio(one, sampling_rate) if audio else encode_frames(one)
        path = folder / f"{row}{'.wav' if audio else '.webp'}"
        with opened(path, os.O_CREAT | os.O_TRUNC) as fd:
            write_all(fd, data, 0)
    sync_folder(folder)


def images_checksum(folder: Path, rows: range) -> int:
    """CRC-32 of the files of some rows, one after another; a missing one counts as empty."""
    found = 0
    for row in rows:
        path = image_path(folder, row)
        data = b"" if path is None else path.read_bytes()
        found = zlib.crc32(data, zlib.crc32(f"{row} {len(data)}".encode(), found))
    return found


def remove_images(folder: Path, first: int = 0) -> None:
    """Remove the files of rows from `first` on."""
    for path in folder.glob("*.w*"):
        if path.suffix in SUFFIXES and path.stem.isdecimal() and int(path.stem) >= first:
            path.unlink()


def encode_frames(x: object) -> bytes:
    """An image, or the frames of a video, as WebP."""
    if isinstance(x, Image.Image):
        frames = [x]
    elif isinstance(x, list) and all(isinstance(frame, Image.Image) for frame in x):
        frames = x
    else:
        frames = [Image.fromarray(frame) for frame in to_bytes(x)]
    first, *rest = frames
    file = io.BytesIO()
    animation = dict(save_all=True, append_images=rest, duration=FRAME_MS) if rest else {}
    first.save(file, "webp", quality=QUALITY, **animation)
    return file.getvalue()


def to_bytes(x: object) -> np.ndarray:
    """Frames (F, H, W, 3 or 4) uint8 of an image or a video in [0, 1]; channels stand first in
    torch and last in NumPy."""
    if torch.is_tensor(x):
        x = x.movedim(-3, -1).float().cpu().numpy() if x.ndim in (3, 4) else x.cpu().numpy()
    x = np.asarray(x)
    if x.ndim not in (3, 4) or x.shape[-1] not in (1, 3, 4):
        raise UsageError(
            f"an array of shape {x.shape} can't be saved as an image: collect with --no_save_images"
        )
    if x.dtype != np.uint8:
        x = (np.nan_to_num(x.astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)
    if x.shape[-1] == 1:
        x = x.repeat(3, -1)
    return x[None] if x.ndim == 3 else x


def encode_audio(x: object, sampling_rate: int) -> bytes:
    """Audio in [-1, 1], (samples,) or (channels, samples), as WAV of 16 bits."""
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
    """Audio samples per second that a pipeline makes, as one of its parts says."""
    for name in ("vocoder", "vae", "unet"):
        config = getattr(getattr(pipe, name, None), "config", None)
        rate = getattr(config, "sampling_rate", None) or getattr(config, "sample_rate", None)
        if rate:
            return int(rate)
    return 44100
