"""What a model made: images, videos or audio, compared, shown and saved.

    made = media_of(output, sampling_rate)          # a Media, from what a pipeline returned
    made.values                                     # what distances compare
    made.pictures()                                 # what plots show
    save_media(made, folder, "untouched")           # videos and audio, as files of their own

Beside activations there is one small file for each row of prompts.jsonl:

    images/0.webp     an image, or a video as an animation
    images/0.wav      audio

`save_images` writes them, `image_path` finds the one of a row, and `images_checksum` tells whether
they are still as they were written.

One rule holds everywhere for the channels of images and videos: one channel is grey, three are
colours, and any other number is a grid of grey images.
"""

import io
import math
import os
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from errors import UsageError
from store.audio import SAMPLING_RATE, audio_picture, encode_audio
from store.disk import opened, sync_folder, write_all, write_atomically

SUFFIXES = (".webp", ".wav")
QUALITY = 90  # of lossy WebP; 100 is the best
FRAME_MS = 125  # how long a frame of a video is shown; pipelines do not say their frame rate
STRIP_FRAMES = 5  # of a video, in its picture
STRIP_HEIGHT = 192  # pixels of a frame in that picture, at most


# --------------------------------------------------------------------------------- what was made


class Media(NamedTuple):
    """What a model made of P prompts, on the CPU, in the dtype in which the model made it."""

    kind: Literal["image", "video", "audio"]

    values: Tensor
    """Images (P, C, H, W) in [0, 1], videos (P, F, C, H, W) in [0, 1], or audio (P, channels,
    samples) in [-1, 1]."""

    sampling_rate: int | None = None
    """Samples of audio per second."""

    def pictures(self) -> Tensor:
        """Return what plots show, (P, 3, H, W) float32 in [0, 1].

        Of an image it is the image, of a video a strip of up to 5 frames, and of audio the waveform
        above the spectrogram.
        """
        if self.kind == "audio":
            return torch.stack([audio_picture(audio) for audio in self.values])
        if self.kind == "video":
            return torch.stack([strip(video) for video in self.values])
        return as_colors(self.values.float())

    def explanation(self) -> str:
        """Return one line that says what the pictures show; "" for images."""
        if self.kind == "video":
            shown = strip_frames(self.values.shape[1])
            return f"frames {', '.join(map(str, shown))} of 0 to {self.values.shape[1] - 1}"
        if self.kind == "audio":
            seconds = self.values.shape[-1] / self.sampling_rate
            return (
                "above: waveform; below: spectrogram, "
                f"0 to {self.sampling_rate / 2000:.3g} kHz upwards; 0 to {seconds:.3g} s"
            )
        return ""


def join_media(batches: list[Media]) -> Media:
    """Return several batches as one."""
    return batches[0]._replace(values=torch.cat([batch.values for batch in batches]))


def media_of(output: object, sampling_rate: int) -> Media | None:
    """Return what a pipeline returned as Media, or None if it holds no images, videos or audio.

    output: as for `save_images`. sampling_rate: of audio.
    """
    is_audio, made = unwrap(output)
    if is_audio:
        audio = torch.as_tensor(made).cpu()
        if audio.ndim == 2:
            audio = audio[:, None]
        return Media("audio", audio, sampling_rate)

    values = stack(made)
    if values is None or values.ndim not in (4, 5):
        return None
    return Media("image" if values.ndim == 4 else "video", values.cpu())


def unwrap(output: object) -> tuple[bool, object]:
    """Return (whether it is audio, what lies in the field or key `images`, `frames` or `audios`).

    Of a tuple or dict without such a name it is the first item; an object is returned as it is.
    """
    for name in ("images", "frames", "audios"):
        if hasattr(output, name):
            return name == "audios", getattr(output, name)
        if isinstance(output, dict) and name in output:
            return name == "audios", output[name]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple) and output:
        output = output[0]
    return False, output


def stack(made: object) -> Tensor | None:
    """Return images or videos as one tensor (P, C, H, W) or (P, F, C, H, W), None for anything
    else.

    made: a tensor in this order; an array of NumPy, whose channels are behind the width, in [0, 1]
    or uint8; a list of PIL images, or of lists of them.
    """
    if torch.is_tensor(made):
        return in_unit_range(made) if made.dtype == torch.uint8 else made
    if isinstance(made, list):
        if not made:
            return None
        if all(isinstance(item, Image.Image) for item in made):
            if len({(image.size, image.mode) for image in made}) > 1:
                return None
            made = np.stack([np.asarray(image) for image in made])
            if made.ndim == 3:  # grey, without an axis of channels
                made = made[..., None]
        else:
            items = [stack(item) for item in made]
            if any(item is None for item in items) or len({item.shape for item in items}) > 1:
                return None
            return torch.stack(items)
    if not isinstance(made, np.ndarray) or made.ndim < 3:
        return None
    return in_unit_range(torch.from_numpy(made)).movedim(-1, -3)


def in_unit_range(x: Tensor) -> Tensor:
    """Return pixels as float32 in [0, 1]: only uint8 has to be divided, by 255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


# ------------------------------------------------------------------------------------- pictures


def as_colors(x: Tensor) -> Tensor:
    """Return images or frames (..., C, H, W) with three channels, (..., 3, H', W').

    One channel is repeated, three are returned as they are. Any other number is laid out as a
    square grid of grey images, row by row, with white in the cells that are left over: 5 channels
    of 8 x 8 give a picture of 16 x 24.
    """
    C, H, W = x.shape[-3:]
    if C == 3:
        return x
    columns = math.ceil(math.sqrt(C))
    rows = math.ceil(C / columns)
    cells = x.new_ones(*x.shape[:-3], rows * columns, H, W)
    cells[..., :C, :, :] = x
    cells = cells.unflatten(-3, (rows, columns)).transpose(-3, -2)  # (..., rows, H, columns, W)
    grid = cells.reshape(*x.shape[:-3], 1, rows * H, columns * W)
    return torch.cat([grid] * 3, -3)


def strip_frames(num_frames: int) -> list[int]:
    """Return which frames stand in the strip of a video: of 9 frames [0, 2, 4, 6, 8]."""
    count = min(STRIP_FRAMES, num_frames)
    return [round(number) for number in np.linspace(0, num_frames - 1, count).tolist()]


def strip(video: Tensor) -> Tensor:
    """Return up to 5 frames of a video side by side, with white between them.

    (F, C, H, W) -> (3, h, n * w + (n - 1) * gap), float32.
    """
    frames = as_colors(video[strip_frames(len(video))].float())
    H, W = frames.shape[-2:]
    if H > STRIP_HEIGHT:
        frames = interpolate(frames, (STRIP_HEIGHT, round(W * STRIP_HEIGHT / H)), mode="area")
    gap = frames.new_ones(3, frames.shape[-2], max(1, frames.shape[-1] // 40))
    pieces = [frames[0]]
    for frame in frames[1:]:
        pieces += [gap, frame]
    return torch.cat(pieces, -1)


# ----------------------------------------------------------------------------------------- files


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
    torch or (N, H, W, C) of NumPy; videos, with an axis of frames behind N; an object or dict with
    `images`, `frames` or `audios` that is one of these; or a tuple or dict that begins with one.
    audios: (N, samples) or (N, channels, samples) in [-1, 1]. Files of rows that were saved before
    are overwritten.

    Raises UsageError for anything else, and if there is not one for each row.
    """
    is_audio, made = unwrap(output)
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


def save_media(made: Media, folder: Path, name: str) -> list[Path]:
    """Save what a picture does not show whole, one file per prompt; return their paths.

    These are folder/videos/<name>_<i>.webp or folder/audio/<name>_<i>.wav for prompt i. For images
    nothing is saved, and the result is []. Files of the same names are overwritten.
    """
    if made.kind == "image":
        return []
    paths = []
    for i, x in enumerate(made.values):
        if made.kind == "audio":
            path = folder / "audio" / f"{name}_{i}.wav"
            data = encode_audio(x, made.sampling_rate)
        else:
            path = folder / "videos" / f"{name}_{i}.webp"
            data = encode_frames(x)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, data)
        paths.append(path)
    return paths


def describe_files(paths: list[Path]) -> str:
    """Return the end of the line that says what was written: ", 16 files in steer/12_x0/audio".

    paths: what `save_media` returned, all in one folder. Returns "" if there are none.
    """
    if not paths:
        return ""
    return f", {len(paths)} files in {paths[0].parent}"


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
    """Return the frames of an image or a video as uint8, (F, H, W, 3).

    x: numbers in [0, 1], or uint8 of NumPy. torch has the channels in front of the height and the
    width, NumPy behind them: (3, H, W) of torch gives (1, H, W, 3). Other numbers of channels than
    three become three, see `as_colors`. Raises UsageError for another shape.
    """
    shape = tuple(np.shape(x))
    if len(shape) not in (3, 4) or 0 in shape:
        raise UsageError(
            f"an array of shape {shape} can't be saved as an image: collect with --no_save_images"
        )
    if not torch.is_tensor(x):
        x = torch.from_numpy(np.asarray(x)).movedim(-1, -3)
    colors = as_colors(in_unit_range(x.cpu()))
    levels = (colors.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    frames = levels.movedim(-3, -1).numpy()
    return frames[None] if frames.ndim == 3 else frames
