"""HookPoint: what one activation file is of, and what an SAE was trained on."""

from dataclasses import asdict, dataclass
from pathlib import Path

from errors import UsageError, check_choice
from store.activation_file import read_description

SIDES = ("output", "input", "diff")
STREAMS = ("image", "text")
ROWS = ("cond", "uncond")


@dataclass(frozen=True)
class HookPoint:
    """A place in a denoiser, and which of the numbers there are meant."""

    hook_name: str
    """Name of a module of the denoiser, such as up_blocks.1.attentions.1."""

    side: str = "output"
    """output: what the module returns. input: what it takes. diff: output - input."""

    stream: str = "image"
    """image or text: which tokens of a joint block."""

    rows: str = "cond"
    """cond or uncond: which rows of classifier-free guidance."""

    def __post_init__(self) -> None:
        for name, choices in (("side", SIDES), ("stream", STREAMS), ("rows", ROWS)):
            check_choice(name, getattr(self, name), choices)

    @classmethod
    def from_description(cls, meta: dict) -> "HookPoint":
        """The hook point that the .json beside an activation file names. Raises UsageError where it
        names none."""
        keys = ("hook_name", "side", "stream", "rows")
        missing = [key for key in keys if key not in meta]
        if missing:
            raise UsageError(
                f"the description of the activations does not say {', '.join(missing)}"
            )
        return cls(*(meta[key] for key in keys))

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @property
    def file_name(self) -> str:
        """Name of its activation file, without .npy: <hook_name>[.uncond][.input|.diff][.text]"""
        name = self.hook_name
        if self.rows == "uncond":
            name += ".uncond"
        if self.side != "output":
            name += f".{self.side}"
        if self.stream == "text":
            name += ".text"
        return name


def trained_on(sae) -> HookPoint:
    """The hook point of an SAE's training vectors: as its cfg.json says, or else the descriptions
    beside its training files.

    Raises UsageError where a file has no description (moved, or not made by collect.py), or where
    two name different ones.
    """
    if sae.hook_point is not None:
        return sae.hook_point
    found = []
    for path in sae.cfg.get("data") or []:
        meta = read_description(path)
        try:
            found.append(HookPoint.from_description(meta))
        except UsageError as error:
            raise UsageError(
                f"{Path(path).with_suffix('.json')} is not there or not complete: {error}"
            ) from None
    if not found:
        raise UsageError(
            "the SAE's cfg.json names no activation file, so it is not known where in the model it belongs"
        )
    for other in found:
        if other != found[0]:
            raise UsageError(
                f"the SAE was trained on files of several hook points, {found[0]} and {other}"
            )
    return found[0]
