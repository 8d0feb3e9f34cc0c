"""The commands, Python blocks and links of README.md, CONTRIBUTING.md and docs/.

    python tests/documents.py             # the commands that run without a download, a GPU and an account
    python tests/documents.py --run       # run them one after another in a new folder (`.ci/slow` does)

A comment `<!-- not run: reason -->` above a block says that it is not run.
"""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
PAGES = [HERE / "README.md", HERE / "CONTRIBUTING.md", *sorted((HERE / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<mark><!-- not run: [^\n]* -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Commands that need more than this folder are not run: a hub model, an account, other packages, an
# hour or a GPU for each process. The tests and the toy's check are run elsewhere in `.ci`.
NOT_RUN = ("--to_hub", "torchrun", "pip", "pre-commit", "toy.make", "unlearn", "step", "pytest")
HUB_MODELS = ("sd-legacy/", "stabilityai/")
FREE = ("pip", "pre-commit")  # programs of others, whose options are not looked at


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    text: str
    is_run: bool


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a page in one language, in their order."""
    result = []
    for match in FENCE.finditer(page.read_text()):
        if match["language"] == language:
            result.append(Block(page, language, match["text"], match["mark"] is None))
    return result


def commands(block: Block) -> list[list[str]]:
    """The command lines of a bash block as words; "a && b" gives two.

    For "python a.py --x 1 \\\\\\n --y && python b.py  # why" it gives [["python", "a.py", "--x", "1", "--y"],
    ["python", "b.py"]].
    """
    lines = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            end = words.index("&&")
            lines.append(words[:end])
            words = words[end + 1 :]
        if words:
            lines.append(words)
    return lines


def all_commands() -> Iterator[tuple[Block, list[str]]]:
    """Every command line of every page."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for words in commands(block):
                yield block, words


def without_code(text: str) -> str:
    """A page without its fenced blocks, in which nothing is a link."""
    return FENCE.sub("", text)


def links(page: Path) -> list[str]:
    """The targets of all links and pictures of a page."""
    return LINK.findall(without_code(page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page: `## How much disk?` has
    how-much-disk."""
    names = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        names.add(kept.replace(" ", "-"))
    return names


def own_model() -> str:
    """The file of docs/models.md that makes a model of one's own."""
    for block in blocks(HERE / "docs" / "models.md", "python"):
        if block.text.startswith("# my_model.py"):
            return block.text
    raise AssertionError("docs/models.md has no my_model.py")


def own_model_commands() -> list[list[str]]:
    """The commands of docs/models.md on that file."""
    for block in blocks(HERE / "docs" / "models.md", "bash"):
        if "my_model.py" in block.text:
            return commands(block)
    raise AssertionError("docs/models.md has no commands on my_model.py")


def runs_here(block: Block, words: list[str]) -> bool:
    """Whether a command is run by `.ci/slow`."""
    for word in words:
        if word in NOT_RUN or word.startswith(HUB_MODELS):
            return False
    return block.is_run


def prepare(folder: Path) -> None:
    """A clone, with the files of the reader's own that the commands name."""
    subprocess.run(["git", "clone", "-q", str(HERE), str(folder)], check=True)
    (folder / "my_model.py").write_text(own_model())
    (folder / "prompts.csv").write_text("prompt\n" + "cat\ndog\nfox\nowl\n" * 4)
    (folder / "photos").mkdir()
    from PIL import Image

    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(folder / "photos" / f"{number}.png")


def adapted(words: list[str]) -> list[str]:
    """A command as its reader would adapt it: this Python, and a folder of its own for a collection
    with other options, so that it does not meet the one that is there."""
    options = []
    for word in words:
        word = word.replace("activations/shard", "activations_shards/shard")
        options.append(word.replace("saes/mine", "saes/up_blocks.1.attentions.1_k16_M1536"))
    if options[0] == "python":
        options[0] = sys.executable
    if "collect.py" in words and "--shard" in words:
        options += ["--out_dir", "activations_shards"]
    if "collect.py" in words and "--images" in words:
        options += ["--out_dir", "activations_photos"]
    return options


def run_all() -> int:
    """Run the commands in a new clone; print each with its time. Returns how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "clone")
        prepare(folder)
        for block, words in all_commands():
            if not runs_here(block, words):
                continue
            options = adapted(words)
            start = time.perf_counter()
            done = subprocess.run(options, cwd=folder, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            verdict = "FAIL" if done.returncode else "pass"
            print(f"{verdict} {seconds:6.1f} s  {block.page.name}: {shlex.join(words)}", flush=True)
            if done.returncode:
                failed += 1
                print("\n".join(done.stderr.splitlines()[-5:]))
    return failed


if __name__ == "__main__":
    if "--run" in sys.argv:
        sys.exit(min(run_all(), 1))
    for block, words in all_commands():
        if runs_here(block, words):
            print(f"{block.page.name}: {shlex.join(words)}")
