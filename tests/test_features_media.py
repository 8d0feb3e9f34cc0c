"""The page of videos and audio: which frame a map covers, where time runs, what a browser shows
and plays."""

import json

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from pages import read_page, write_block
from PIL import Image

from diffusion.audio_span import place_of
from features import Config, MapGrid, frames_shown, latent_frame, main, map_grid
from sae import Sae
from store.audio import encode_audio, read_audio, resample
from store.dataset import open_activations

RATE = 8000


def indicator_sae(folder, d=4):
    """An SAE whose latent i is active on the unit vector i, and on nothing else."""
    sae = Sae(d, d, 1)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.eye(d))
        sae.encoder.bias.zero_()
        sae.W_dec.copy_(torch.eye(d))
        sae.b_dec.zero_()
    sae.save_to_disk(folder)
    return folder


def page_of(tmp_path, path, **options):
    sae = indicator_sae(tmp_path / "sae")
    main(Config(sae=str(sae), data=[str(path)], out_dir=str(tmp_path), device="cpu", **options))
    return tmp_path / "sae.html", read_page(tmp_path / "sae.html")


def write_video(tmp_path, num_frames=9, num_latents=3, moving=2):
    """Feature 0 is active in latent frame `moving`, at the top left of 2 x 4 tokens; the frames
    count up in their brightness."""
    x = np.zeros((2, 1, num_latents, 2, 4, 4), np.float32)
    x[..., 1] = 0.1
    x[0, :, moving, 0, 0] = [5, 0, 0, 0]
    x[1, :, moving, 1, 3] = [3, 0, 0, 0]
    path = write_block(tmp_path / "acts", x.reshape(2, 1, -1, 4), grid=[num_latents, 2, 4])
    folder = path.with_name("images")
    folder.mkdir()
    frames = [Image.new("RGB", (64, 32), (20 * i, 0, 0)) for i in range(num_frames)]
    for p in range(2):
        frames[0].save(folder / f"{p}.webp", save_all=True, append_images=frames[1:], lossless=True)
    return path


def write_audio(tmp_path, grid=(12,), seconds=1.5, **audio):
    """Feature 0 is active in the last third of the tokens; a tone sounds there."""
    num_tokens = int(np.prod(grid))
    x = np.zeros((2, 1, num_tokens, 4), np.float32)
    x[..., 1] = 0.1
    x[:, :, 2 * num_tokens // 3 :] = [4, 0, 0, 0]
    meta = {"sampling_rate": RATE, "first_sample": 0, "num_samples": int(1.5 * RATE)} | audio
    path = write_block(
        tmp_path / "acts", x, grid=list(grid), audio=meta, timesteps=[-1.5736], sigmas=[0.1]
    )
    sound = torch.zeros(1, int(seconds * RATE))
    sound[:, RATE:] = torch.sin(torch.arange(sound.shape[1] - RATE))
    path.with_name("images").mkdir()
    for p in range(2):
        (path.with_name("images") / f"{p}.wav").write_bytes(encode_audio(sound, RATE))
    return path


# ------------------------------------------------------------------------------- where and when


def test_latent_frames_cover_frames():
    """The first alone, then four together; one for each; and equal shares where nothing fits."""
    assert [latent_frame(f, 9, 3) for f in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert [latent_frame(f, 5, 5) for f in range(5)] == [0, 1, 2, 3, 4]
    assert [latent_frame(f, 8, 2) for f in range(8)] == [0, 1, 1, 1, 1, 1, 1, 1]
    assert [latent_frame(f, 8, 4) for f in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert latent_frame(0, 1, 3) == 0 and latent_frame(5, 9, 1) == 0


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 9, 16, 33, 81, 129])
@pytest.mark.parametrize("num_latents", [1, 2, 3, 5, 9, 21, 33])
@pytest.mark.parametrize("most", [1, 2, 8])
def test_every_frame_of_a_map_is_seen(num_frames, num_latents, most):
    map_frames = min(num_latents, most)
    grid = MapGrid((num_latents, 2, 4), (map_frames, 2, 4), 2.0)
    shown = frames_shown(num_frames, grid, most)
    assert len(shown) == max(map_frames, min(num_frames, most))
    frames, covered = zip(*shown)
    assert sorted(frames) == list(frames) and 0 <= frames[0] and frames[-1] < num_frames
    if num_frames >= num_latents:
        assert sorted(set(covered)) == list(range(map_frames))


def test_maps_of_audio_have_time_to_the_right_and_frequency_upwards(tmp_path):
    """The token of the third of six times, and of the lowest of three bands."""
    for grid, token in (([6, 3], 2 * 3 + 0), ([3, 6], 0 * 6 + 2)):
        folder = tmp_path / str(grid[0])
        path = write_block(folder, np.zeros((1, 1, 18, 4), np.float32), grid=grid, audio={})
        file = open_activations([path])[0].sources[0]
        cells = map_grid(file, 16)
        assert cells.shape == (1, 3, 6) and cells.ratio is None
        cell = int(cells.cells_of(np.array([token]))[0])
        assert (cell // 6, cell % 6) == (2, 2)
        assert sorted(cells.cells_of(np.arange(18)).tolist()) == list(range(18))
    long = write_block(
        tmp_path / "long", np.zeros((1, 1, 4096, 4), np.float32), grid=[256, 16], audio={}
    )
    assert map_grid(open_activations([long])[0].sources[0], 16).shape == (1, 4, 64)


def test_the_place_of_audio_in_what_was_decoded():
    whole = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert place_of(whole[120:300], whole) == 120
    assert place_of(whole[:5], whole) == 0 and place_of(whole, whole) == 0
    assert place_of(whole[100:200] + 1e-3, whole) is None
    assert place_of(whole, whole[:99]) is None
    silent = torch.cat([torch.zeros(50), whole])
    assert place_of(silent[40:200], silent) == 40


def test_audio_survives_a_file_and_resampling(tmp_path):
    time = torch.arange(4000) / RATE
    audio = torch.stack([torch.sin(2 * torch.pi * 200 * time), torch.zeros(4000)])
    (tmp_path / "0.wav").write_bytes(encode_audio(audio, RATE))
    read, rate = read_audio(tmp_path / "0.wav")
    assert rate == RATE and torch.allclose(read, audio, atol=1e-4)
    slower = resample(audio[0], RATE, 1000)
    assert slower.shape == (500,)
    assert torch.allclose(slower, audio[0, ::8], atol=1e-3)
    assert resample(audio[0], RATE, 16000) is audio[0] or resample(audio[0], RATE, 16000).shape == (
        4000,
    )


# ------------------------------------------------------------------------------------- the page


def test_the_maps_of_a_video_have_frames(tmp_path):
    page, data = page_of(tmp_path, write_video(tmp_path))
    assert (data["shapes"], data["frames"], data["ratios"]) == ([[2, 4]], [3], [2.0])
    levels = data["levels_of"][0].reshape(2, 3, 2, 4)
    assert levels[0].argmax() == 2 * 8 and levels[0, :2].max() == 0
    assert levels[1].argmax() == 2 * 8 + 7
    covered = [frame for frame, _ in data["films"]["0"]]
    assert covered == [0, 1, 1, 1, 2, 2, 2, 2] and data["pictures"] == [None, None]
    _, few = page_of(tmp_path / "few", write_video(tmp_path / "few"), max_frames=2)
    assert few["frames"] == [2] and [frame for frame, _ in few["films"]["0"]] == [0, 1]


def test_the_page_of_audio_has_sound_and_seconds(tmp_path):
    page, data = page_of(tmp_path, write_audio(tmp_path))
    assert data["audio"] == [{"seconds": 1.5, "first": 0.0, "khz": 4.0}]
    assert data["sounds"]["0"].startswith("data:audio/wav;base64,UklGR")
    levels = data["levels_of"][0][0]
    assert (levels > 0).tolist() == [False] * 8 + [True] * 4
    assert data["timesteps"] == [-1.5736]
    assert "media-src data:" in page.read_text()


def test_a_damaged_sound_is_said(tmp_path):
    path = write_audio(tmp_path)
    (path.with_name("images") / "1.wav").write_bytes(b"RIFF")
    _, data = page_of(tmp_path, path)
    assert "some pictures are missing" in data["note"] and list(data["sounds"]) == ["0"]


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)
FIRST = "document.querySelector('#pictures .picture')"
PIXELS = "[...{0}.querySelector('canvas').getContext('2d').getImageData(0, 0, {1}, {2}).data]"


def alpha(browser, width, height):
    """The opacity of the first map, (height, width)."""
    values = browser.run(PIXELS.format(FIRST, width, height))
    return np.array(values[3::4]).reshape(height, width)


@pytest.mark.slow
@needs_browser
def test_a_video_in_a_browser(tmp_path):
    page, data = page_of(tmp_path, write_video(tmp_path))
    visible = (
        f"[...{FIRST}.querySelectorAll('img')].findIndex(i => getComputedStyle(i).visibility "
        "!== 'hidden')"
    )
    moment = f"Number({FIRST}.dataset.moment)"
    drawn = f"{FIRST}.querySelector('canvas').dataset.frame"
    with Browser() as browser:
        browser.open(page, "#f=0")
        browser.wait(f"{drawn} == 2")  # it opens on the peak
        assert browser.run(moment) == 4 == browser.run(visible)
        shown = alpha(browser, 4, 2)
        assert shown[0, 0] == 255 and (shown > 0).sum() == 1

        slide = (
            "(() => {{ const s = document.getElementById('frame'); s.value = {}; "
            "s.dispatchEvent(new Event('input')); }})()"
        )
        browser.run(slide.format(0))
        browser.wait(f"{drawn} == 0")
        assert browser.run(visible) == 0 and not alpha(browser, 4, 2).any()
        browser.run("document.getElementById('play').click()")
        browser.wait(f"{moment} >= 2")
        browser.run("document.getElementById('play').click()")
        stopped = browser.run(moment)
        assert browser.run(f"new Promise(r => setTimeout(() => r({moment}), 600))") == stopped
        bar = "document.querySelector('.timeline')"
        browser.run(
            f"(b => b.dispatchEvent(new MouseEvent('click', {{clientX: b.getBoundingClientRect()"
            f".right - 2, clientY: b.getBoundingClientRect().top + 2}})))({bar})"
        )
        browser.wait(f"{drawn} == 2")
        assert browser.run("document.getElementById('caption').textContent").startswith(
            "where it is active, frame by frame"
        )
        assert browser.errors == []


@pytest.mark.slow
@needs_browser
def test_audio_in_a_browser(tmp_path):
    page, _ = page_of(tmp_path, write_audio(tmp_path))
    player = "document.querySelector('#pictures audio')"
    with Browser() as browser:
        browser.open(page, "#f=0")
        browser.wait(f"{player}.readyState >= 1")  # the policy lets it load
        assert browser.run(f"{player}.duration") == pytest.approx(1.5, abs=0.01)
        browser.wait("document.querySelectorAll('#pictures canvas[data-drawn]').length == 2")
        shown = alpha(browser, 12, 1)
        assert (shown[0] > 0).tolist() == [False] * 8 + [True] * 4
        box = "(b => [b.left, b.right])({}.getBoundingClientRect())".format
        image = browser.run(box(f"{FIRST}.querySelector('img')"))
        assert browser.run(box(f"{FIRST}.querySelector('canvas')")) == image
        browser.run(f"{player}.currentTime = 0.75")
        browser.wait(f"{FIRST}.querySelector('.head').style.left == '50%'")
        text = browser.run("document.getElementById('pictures').textContent")
        assert "1.5 s" in text and "4 kHz" in text
        assert browser.run("number(-1.5736)") == "-1.57"
        assert browser.run("getComputedStyle(document.getElementById('player')).display") == "none"
        assert browser.errors == []


@pytest.mark.slow
@needs_browser
def test_the_line_of_the_player_is_where_the_audio_lies_in_the_map(tmp_path):
    """The audio is the second half of what the tokens stand for; before it the picture is grey."""
    path = write_audio(tmp_path, seconds=1.5, first_sample=int(1.5 * RATE), num_samples=3 * RATE)
    page, data = page_of(tmp_path, path)
    assert data["audio"][0] == {"seconds": 3.0, "first": 1.5, "khz": 4.0}
    player = "document.querySelector('#pictures audio')"
    grey = (
        f"(i => {{ const c = document.createElement('canvas'); c.width = i.naturalWidth; "
        "c.height = i.naturalHeight; const x = c.getContext('2d'); x.drawImage(i, 0, 0); "
        "return [...x.getImageData(120, 100, 1, 1).data, ...x.getImageData(300, 100, 1, 1).data]; "
        f"}})({FIRST}.querySelector('img'))"
    )
    with Browser() as browser:
        browser.open(page, "#f=0")
        browser.wait(f"{player}.readyState >= 1 && {FIRST}.querySelector('img').naturalWidth")
        browser.run(f"{player}.currentTime = 0.75")
        browser.wait(f"{FIRST}.querySelector('.head').style.left == '75%'")
        pixels = browser.run(grey)
        assert min(pixels[:3]) > 200 and max(pixels[4:7]) < 60
        assert json.dumps(browser.errors) == "[]"
