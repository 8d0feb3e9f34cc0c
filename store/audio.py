"""Audio that a model made: WAV files, and a picture of the waveform above the spectrogram.

data = encode_audio(audio, sampling_rate)       # the bytes of a WAV file
picture = audio_picture(audio, sampling_rate)   # (3, 160, 480) in [0, 1]
"""

import io
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

SAMPLING_RATE = 44100  # audio samples per second, if the pipeline does not say it
PICTURE_WIDTH = 480  # pixels
WAVE_HEIGHT = 49  # pixels of the waveform in a picture; odd, so that one row is silence
SPECTROGRAM_HEIGHT = 111  # pixels of the spectrogram below it
WINDOW = 1024  # samples of a Fourier transform, at most: 23 ms at 44.1 kHz
DECIBELS = 80  # below the loudest, a spectrogram is black
# From silence to the loudest, as RGB in [0, 1]: black, violet, orange, pale yellow
COLORS = ((0.0, 0.0, 0.02), (0.34, 0.06, 0.43), (0.89, 0.35, 0.2), (0.99, 1.0, 0.75))
WAVE_COLOR = (0.18, 0.43, 0.71)


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


def read_audio(path: Path) -> tuple[Tensor, int]:
    """Return (the audio (channels, samples) in [-1, 1], samples per second) of a WAV file as
    `encode_audio` makes one.

    Raises OSError, EOFError or wave.Error for a file that is missing or no such file.
    """
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise wave.Error(f"{path}: expected 16 bits per sample")
        levels = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        audio = levels.reshape(-1, file.getnchannels()).T.astype(np.float32) / 32767
        return torch.from_numpy(audio), file.getframerate()


def audio_seconds(path: Path) -> float:
    """Return how long a WAV file lasts, 0 if it is missing or damaged."""
    try:
        with wave.open(str(path)) as file:
            return file.getnframes() / file.getframerate()
    except (OSError, EOFError, wave.Error):
        return 0.0


def resample(mono: Tensor, sampling_rate: int, new_rate: int) -> Tensor:
    """Return a waveform (samples,) at a lower sampling rate, without its higher frequencies.

    A new rate that is not lower returns the waveform as it is.
    """
    num_samples = max(1, len(mono) * new_rate // sampling_rate)
    if num_samples >= len(mono):
        return mono
    frequencies = torch.fft.rfft(mono)[: num_samples // 2 + 1]
    return torch.fft.irfft(frequencies, num_samples) * (num_samples / len(mono))


def sampling_rate_of(pipe: object) -> int:
    """Return how many audio samples per second a pipeline makes, as one of its parts says."""
    for name in ("vocoder", "vae", "unet"):
        config = getattr(getattr(pipe, name, None), "config", None)
        rate = getattr(config, "sampling_rate", None) or getattr(config, "sample_rate", None)
        if rate:
            return int(rate)
    return SAMPLING_RATE


# -------------------------------------------------------------------------------------- pictures


def audio_picture(audio: Tensor, width: int = PICTURE_WIDTH) -> Tensor:
    """Return the waveform above the spectrogram, (3, 160, width) in [0, 1].

    audio: (channels, samples) in [-1, 1]; the channels are averaged. Time runs to the right, and
    frequency upwards from 0 to half the sampling rate.
    """
    mono = audio.float().nan_to_num().mean(0)
    return torch.cat([waveform_picture(mono, width), spectrogram_picture(mono, width)], -2)


def waveform_picture(mono: Tensor, width: int) -> Tensor:
    """Return a waveform (samples,) in [-1, 1] on white, (3, 49, width)."""
    edges = torch.linspace(0, len(mono), width + 1).long().tolist()
    height = torch.linspace(1, -1, WAVE_HEIGHT)  # of each row of pixels
    half = 1 / (WAVE_HEIGHT - 1)  # half a row, so that silence is a line
    is_wave = torch.zeros(WAVE_HEIGHT, width, dtype=torch.bool)
    for column in range(width):
        first = min(edges[column], len(mono) - 1)
        piece = mono[first : max(first + 1, edges[column + 1])].clamp(-1, 1)
        is_wave[:, column] = (height <= piece.max() + half) & (height >= piece.min() - half)
    return torch.where(is_wave, torch.tensor(WAVE_COLOR)[:, None, None], 1.0)


def spectrogram(mono: Tensor) -> Tensor:
    """Return the loudness of a waveform (samples,) as (frequencies, times) in [0, 1].

    The first row is the frequency 0, the last half the sampling rate. 1 is the loudest, and 0 is
    80 decibels below it or silence.
    """
    window = min(WINDOW, max(4, 2 ** int(np.log2(max(4, len(mono) // 8)))))
    power = torch.stft(
        mono,
        n_fft=window,
        hop_length=window // 4,
        window=torch.hann_window(window),
        pad_mode="constant",
        return_complex=True,
    ).abs()
    loudest = power.max()
    if loudest == 0:
        return power
    decibels = 20 * (power / loudest).clamp_min(1e-10).log10()
    return (1 + decibels / DECIBELS).clamp(0, 1)


def spectrogram_picture(mono: Tensor, width: int) -> Tensor:
    """Return the spectrogram of a waveform (samples,) in colours, (3, 111, width)."""
    loudness = spectrogram(mono).flip(0)  # low frequencies at the bottom
    size = (SPECTROGRAM_HEIGHT, width)
    loudness = interpolate(loudness[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    colors = torch.tensor(COLORS)
    position = loudness * (len(colors) - 1)
    lower = position.long().clamp(0, len(colors) - 2)
    mix = (position - lower)[..., None]
    return torch.lerp(colors[lower], colors[lower + 1], mix).movedim(-1, 0)
