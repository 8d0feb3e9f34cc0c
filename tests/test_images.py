"""What a model made: told apart by kind, shown by one rule, and drawn as what it is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from store.audio import WAVE_HEIGHT, audio_picture, spectrogram
from store.images import Media, as_colors, join_media, media_of, strip_frames

RATE = 8000


def tone(frequency, seconds=1.0):
    return torch.sin(2 * torch.pi * frequency * torch.arange(int(RATE * seconds)) / RATE)


def test_the_kinds_of_outputs():
    video = torch.rand(2, 5, 3, 8, 8)
    for output in ({"frames": video}, (video, 7), SimpleNamespace(frames=video), video):
        made = media_of(output, RATE)
        assert made.kind == "video" and torch.equal(made.values, video)
    for channels in (1, 2, 3, 5):
        images = torch.rand(2, channels, 8, 8)
        made = media_of(SimpleNamespace(images=images), RATE)
        assert made.kind == "image" and torch.equal(made.values, images)
        assert made.pictures().shape[1] == 3
    for audio in (torch.rand(2, 400), torch.rand(2, 1, 400), np.zeros((2, 400), np.float32)):
        made = media_of(SimpleNamespace(audios=audio), RATE)
        assert (made.kind, made.sampling_rate) == ("audio", RATE)
        assert made.values.shape == (2, 1, 400)
    for none in (torch.rand(2, 400), [], (), {"images": "of PIL"}, SimpleNamespace(meshes=[1])):
        assert media_of(none, RATE) is None


def test_pil_and_numpy_are_the_same_numbers():
    levels = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 12, 3), np.uint8)
    expected = torch.from_numpy(levels).movedim(-1, -3).float() / 255
    frames = [[Image.fromarray(frame) for frame in video] for video in levels]
    for videos in (levels, expected.numpy().transpose(0, 1, 3, 4, 2), frames):
        assert torch.equal(media_of(SimpleNamespace(frames=videos), RATE).values, expected)
    grey = [Image.fromarray(frame[..., 0]) for frame in levels[0]]
    made = media_of(SimpleNamespace(images=grey), RATE)
    assert torch.equal(made.values, expected[0, :, :1])
    assert media_of([Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4))], RATE) is None


def test_channels_are_grey_colours_or_a_grid():
    x = torch.rand(2, 3, 4, 6)
    assert as_colors(x) is x
    assert torch.equal(as_colors(x[:, :1]), x[:, :1].repeat(1, 3, 1, 1))
    five = torch.rand(2, 5, 4, 6)
    grid = as_colors(five)
    assert grid.shape == (2, 3, 8, 18)
    for channel in range(5):
        top, left = 4 * (channel // 3), 6 * (channel % 3)
        for color in range(3):
            cell = grid[:, color, top : top + 4, left : left + 6]
            assert torch.equal(cell, five[:, channel])
    assert (grid[:, :, 4:, 12:] == 1).all()


def test_a_video_is_a_strip_of_frames():
    assert strip_frames(9) == [0, 2, 4, 6, 8]
    assert strip_frames(3) == [0, 1, 2]
    assert strip_frames(1) == [0]
    video = torch.rand(2, 9, 1, 4, 6)
    strip = Media("video", video).pictures()
    assert strip.shape == (2, 3, 4, 34)
    assert torch.equal(strip[:, 0, :, 14:20], video[:, 4, 0])
    assert (strip[:, :, :, 13] == 1).all()
    large = Media("video", torch.rand(1, 2, 3, 384, 640)).pictures()
    assert large.shape == (1, 3, 192, 320 + 8 + 320)
    assert Media("video", video).explanation() == "frames 0, 2, 4, 6, 8 of 0 to 8"


def test_a_tone_is_a_line_at_its_frequency():
    for frequency in (500, 1000, 3000):
        loudness = spectrogram(tone(frequency))
        height = loudness.shape[0] - 1
        middle = loudness[:, loudness.shape[1] // 2]
        assert middle.argmax().item() / height * RATE / 2 == pytest.approx(frequency, abs=20)
    assert not spectrogram(torch.zeros(4000)).any()


def test_the_picture_of_audio_shows_when_and_how_high():
    """Silence, then a low tone, then a high one."""
    audio = torch.cat([torch.zeros(RATE), tone(400), 0.5 * tone(3600)])
    picture = audio_picture(audio[None])
    assert picture.shape == (3, 160, 480) and 0 <= picture.min() and picture.max() <= 1
    wave, spectrum = picture[:, :WAVE_HEIGHT], picture[:, WAVE_HEIGHT:]
    blue = (wave[0] < 0.5).sum(0)  # pixels of each column that belong to the wave
    assert blue[10:150].max() <= 2
    assert blue[170:310].min() > 40
    assert 20 < blue[330:470].float().mean() < 30
    brightness = spectrum.sum(0)
    assert brightness[:, 10:140].max() < 0.1
    assert 95 < brightness[:, 240].argmax() < 105  # a tenth from the bottom
    assert 5 < brightness[:, 400].argmax() < 17  # a tenth from the top


def test_audio_of_a_few_samples_has_a_picture():
    for samples in (1, 2, 5, 48):
        assert audio_picture(torch.rand(2, samples)).shape == (3, 160, 480)
    made = Media("audio", torch.zeros(2, 2, RATE), RATE)
    assert made.pictures().shape == (2, 3, 160, 480)
    assert "0 to 4 kHz upwards; 0 to 1 s" in made.explanation()
    assert join_media([made, made]).values.shape == (4, 2, RATE)
