"""HookPoint: where in a denoiser the vectors of an activation file, or of an SAE, come from.

point = HookPoint("mid_block", side="diff")
point.file_name                      # "mid_block.diff", so the file is mid_block.diff.npy
trained_on(sae)                      # the HookPoint of an SAE's training vectors
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from errors import UsageError, check_choice
from store.activation_file import read_description

SIDES = ("output", "input", "diff")
STREAMS = ("image", "text")
ROWS = ("cond", "uncond")


@dataclass(frozen=True)
class HookPoint:
    """A module of a denoiser, and which of its numbers are meant.

    Raises UsageError for a side, stream or rows that do not exist.
    """

    hook_name: str
    """Name of a module of the denoiser, such as up_blocks.1.attentions.1."""

    side: str = "output"
    """output: what the module returns. input: what it takes. diff: output - input."""

    stream: str = "image"
    """image or text: which tokens of a joint block."""

    rows: str = "cond"
    """cond or uncond: which rows of classifier-free guidance."""

    padding: bool = False
    """With stream "text": whether tokens that only fill up a prompt are among those that are
    meant."""

    def __post_init__(self) -> None:
        check_choice("side", self.side, SIDES)
        check_choice("stream", self.stream, STREAMS)
        check_choice("rows", self.rows, ROWS)

    @classmethod
    def from_description(cls, meta: dict) -> "HookPoint":
        """Return the hook point that the description of an activation file, or a cfg.json, names.

        Raises UsageError if one of the first four fields is missing. A description of a text stream
        that does not speak of padding is of an earlier version, which kept it.
        """
        keys = ("hook_name", "side", "stream", "rows")
        missing = [key for key in keys if key not in meta]
        if missing:
            raise UsageError(
                f"the description of the activations does not say {', '.join(missing)}"
            )
        padding = meta["stream"] == "text" and meta.get("padding", True)
        return cls(*[meta[key] for key in keys], padding)

    def as_dict(self) -> dict[str, str]:
        """Return the fields as descriptions hold them, padding of text streams alone;
        `from_description` reads them."""
        fields = asdict(self)
        if self.stream != "text":
            del fields["padding"]
        return fields

    @property
    def file_name(self) -> str:
        """Name of its activation file, without .npy: <hook_name>[.uncond][.input|.diff][.text].

        For HookPoint("mid_block", side="input", rows="uncond") it is "mid_block.uncond.input".
        """
        name = self.hook_name
        if self.rows == "uncond":
            name += ".uncond"
        if self.side != "output":
            name += f".{self.side}"
        if self.stream == "text":
            name += ".text"
        return name


def trained_on(sae) -> HookPoint:
    """Return the hook point of an SAE's training vectors.

    sae: an `Sae`. Its cfg.json says it, or else the descriptions beside its training files. Raises
    UsageError if a file has no description (it was moved, or collect.py did not make it), or if two
    files name different hook points.
    """
    if sae.hook_point is not None:
        return sae.hook_point
    points = []
    for path in sae.cfg.get("data") or []:
        meta = read_description(path)
        try:
            points.append(HookPoint.from_description(meta))
        except UsageError as error:
            raise UsageError(
                f"{Path(path).with_suffix('.json')} is not there or not complete: {error}"
            ) from None
    if not points:
        raise UsageError(
            "the SAE's cfg.json names no activation file, "
            "so it is not known where in the model it belongs"
        )
    for other in points:
        if other != points[0]:
            raise UsageError(
                f"the SAE was trained on files of several hook points, {points[0]} and {other}"
            )
    return points[0]
