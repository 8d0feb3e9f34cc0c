"""docs/troubleshooting.md can't rot: each message that it quotes stands in the source."""

import ast
import re

import pytest

from cli import HERE

PAGE = (HERE / "docs" / "troubleshooting.md").read_text()
HOLE = "..."


def quoted_messages():
    """The code at the beginning of each entry, `- **`message`**`; `...` in it stands for
    anything."""
    return re.findall(r"^- \*\*`(.+?)`\*\*", PAGE, flags=re.MULTILINE)


def text_of(node):
    """A text in the source with HOLE for what is put into it; several for a choice."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            piece.value if isinstance(piece, ast.Constant) else HOLE for piece in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return HOLE


def texts_of_the_source():
    """Every text of the project that has one line."""
    folders = [HERE, *(HERE / name for name in ("analysis", "diffusion", "store", "kernels"))]
    texts = set()
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.JoinedStr, ast.BinOp, ast.Constant)):
                text = text_of(node)
                if "\n" not in text:  # a docstring
                    texts.add(text)
    return "\n".join(sorted(texts))


SOURCE = texts_of_the_source()


def stands_in_the_source(message):
    """Whether the parts of a message between its holes stand in one text of the source, in this
    order."""
    parts = [re.escape(piece.strip()) for piece in message.split(HOLE)]
    return re.search(".*".join(parts), SOURCE) is not None


@pytest.mark.parametrize("message", quoted_messages())
def test_each_quoted_message_stands_in_the_source(message):
    assert stands_in_the_source(message)


def test_the_page_has_entries_and_a_message_that_is_gone_is_noticed():
    assert len(quoted_messages()) > 100
    assert len([line for line in PAGE.splitlines() if line.startswith("- ")]) == len(
        quoted_messages()
    )
    assert not stands_in_the_source("... does not belong to ... but to nobody")
