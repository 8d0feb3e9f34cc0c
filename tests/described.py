"""Activation files that say what they hold, as collect.py writes them."""

import json

from store.disk import checksum


def describe(path, **meta):
    """Write the .json of an activation file, and a prompts.jsonl, if there is none, in which no
    prompt has a text.

    So a prompt is known by its place in its file.
    """
    path.with_suffix(".json").write_text(json.dumps(meta | {"checksum": checksum(meta)}))
    listing = path.with_name("prompts.jsonl")
    if not listing.exists():
        listing.write_text('{"prompt": ""}\n' * 128)
