"""The pages for readers can't rot: commands parse, Python blocks run on the toy, links lead
somewhere."""

import ast
import dataclasses
import importlib
import re

import pytest
import torch
from commands import ROOT
from documents import FREE, PAGES, Block, all_commands, anchors, blocks, commands, links

from options import parse
from sae import Sae

SCRIPTS = ["ablate", "collect", "diagnose", "train", "evaluate", "features", "steer", "export"]
OF_OTHERS = {
    "--nproc_per_node": "torchrun",
    "--nnodes": "torchrun",
    "--node_rank": "torchrun",
    "--master_addr": "torchrun",
    "--master_port": "torchrun",
    "--help": "every script",
    "--install": "wsl",
}
COMMANDS = list(all_commands())
NAMES = [f"{block.page.stem}: {' '.join(words)}" for block, words in COMMANDS]


def check_options(module: str, options: list[str]) -> None:
    """Parse the options as the script would."""
    Config = importlib.import_module(module).Config
    parse(Config, f"{module}.py", [word for word in options if word != "--help"])


def check_command(words: list[str]) -> None:
    """Raise for a command line that no program here understands."""
    program, *rest = words
    if program in FREE:
        return
    if program == "torchrun":
        while rest[0].startswith("--"):
            assert rest[0] in OF_OTHERS, f"torchrun {rest[0]}"
            rest = rest[2:]
    else:
        assert program == "python", f"an unknown program: {words}"
    if rest[:2] == ["-m", "pytest"]:
        assert rest[2:] in ([], ["-m", "not slow"])
    elif rest[:2] == ["-m", "bench"]:
        check_options(f"bench.{rest[2]}", rest[3:])
    elif rest[0] == "-m":
        check_options(rest[1], rest[2:])
    else:
        assert rest[0].removesuffix(".py") in SCRIPTS, f"no script {rest[0]}"
        check_options(rest[0].removesuffix(".py"), rest[1:])


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=NAMES)
def test_each_command_has_options_that_exist(block, words):
    check_command(words)


def test_a_wrong_command_is_noticed():
    page = PAGES[0]
    text = "python train.py \\\n    --data a b && python collect.py --rows maybe  # why\n"
    first, second = commands(Block(page, "bash", text, True))
    assert first == ["python", "train.py", "--data", "a", "b"]
    assert second == ["python", "collect.py", "--rows", "maybe"]
    check_command(first)
    for wrong in (second, ["python", "train.py", "--dta", "a"]):
        with pytest.raises(SystemExit):
            check_command(wrong)
    for wrong in (["python", "trian.py"], ["bash", "train.py"]):
        with pytest.raises(AssertionError):
            check_command(wrong)
    assert len(COMMANDS) > 40


def test_each_option_named_in_a_sentence_exists():
    known = set(OF_OTHERS)
    modules = [*SCRIPTS, "toy.make"]
    modules += [f"bench.{file.stem}" for file in (ROOT / "bench").glob("[a-z]*.py")]
    for module in modules:
        known |= {f"--{f.name}" for f in dataclasses.fields(importlib.import_module(module).Config)}
    known |= {f"--no_{name[2:]}" for name in known}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        code = " ".join(re.findall(r"`([^`]*)`", text))
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        assert named <= known, f"{page.name} names {sorted(named - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_pictures_are_small():
    for path in (ROOT / "docs").iterdir():
        if path.suffix in (".png", ".webp"):
            assert path.stat().st_size < 200_000, path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_well_formed(page):
    for block in blocks(page, "python"):
        ast.parse(block.text)


class Scheduler:
    """Euler's method on three timesteps, for a model of one's own."""

    timesteps = (9.0, 5.0, 1.0)

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.linspace(9, 1, num_inference_steps, device=device)

    def step(self, model_output, timestep, sample):
        return sample - 0.1 * model_output


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Linear(16, 16)

    def forward(self, x):
        return x + self.mlp(x).tanh()


class Denoiser(torch.nn.Module):
    """Tokens of 8 x 8 pixels with 16 channels."""

    def __init__(self):
        super().__init__()
        self.into = torch.nn.Linear(4, 16)
        self.text = torch.nn.Linear(5, 16)
        self.blocks = torch.nn.ModuleList(Layer() for _ in range(3))
        self.out = torch.nn.Linear(16, 4)

    def forward(self, sample, timestep, text):
        x = self.into(sample.flatten(2).transpose(1, 2)) * (1 + timestep / 10)
        x = x + self.text(text)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.out(x).transpose(1, 2).unflatten(2, sample.shape[2:])


def embeddings(texts):
    """A vector (n, 5) for each text."""
    texts = [texts] if isinstance(texts, str) else texts
    values = [
        [len(text) / 10, text.count("e"), text.count("r"), text.count(" "), 1.0] for text in texts
    ]
    return torch.tensor(values)


GENERATING_PAGES = ["README.md", "python.md"]
"""Their blocks generate images with the toy, which takes 10 and 25 s on one core."""


def pages_with_python():
    """The pages that have a Python block to run; those that generate images are slow."""
    pages = []
    for page in PAGES:
        if any(block.is_run for block in blocks(page, "python")):
            marks = [pytest.mark.slow] if page.name in GENERATING_PAGES else []
            pages.append(pytest.param(page, marks=marks))
    return pages


@pytest.mark.parametrize("page", pages_with_python(), ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Sae(96, 1536, 16).save_to_disk("saes/up_blocks.1.attentions.1_k16_M1536")
    names = {"__name__": page.stem}
    if page.name == "models.md":
        names |= {"model": Denoiser().eval(), "scheduler": Scheduler(), "embeddings": embeddings}
    for block in blocks(page, "python"):
        if block.is_run:
            exec(compile(block.text, page.name, "exec"), names)
    if page.name == "models.md":
        x = names["cache"]["output"]["blocks.1"]
        assert x.shape == (2, 10, 64, 16)
        assert (tmp_path / "mine" / "blocks.1.json").exists()
