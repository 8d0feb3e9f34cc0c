"""Which part of a sample's time the audio shows that a pipeline returns.

    with watch_decoders(model) as decoded:
        output = model.pipe(...)
    decoded.describe(output, sampling_rate)     # {"sampling_rate": 44100, "first_sample": 0, ...}

A pipeline may sample 47 seconds and return the first 10 of them. The hook points compute all 47, so
that a heat map along time covers more than the audio. No pipeline says so; it is seen by comparing
the audio with what the decoder returned.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from diffusion.signatures import tensors
from store.images import unwrap

COMPARED = 16  # samples that are compared at every place


class Decoded:
    """The signals that components other than the denoisers have returned."""

    def __init__(self) -> None:
        self.signals = []

    def see(self, module: nn.Module, args: tuple, output: object) -> None:
        """A forward hook: keep what may be audio, (rows, N) or (rows, channels, N)."""
        for x in tensors(output)[:1]:
            if x.ndim in (2, 3) and x.is_floating_point():
                self.signals.append(x)

    def describe(
        self, output: object, sampling_rate: int, is_latent: bool
    ) -> dict[str, int] | None:
        """Return {"sampling_rate", "first_sample", "num_samples"}, or None if there is no audio.

        num_samples: those that the decoder returned, which the whole sample stands for.
        first_sample: which of them is the first in the audio. If the audio is not found in what a
        decoder returned, the sample stands for the audio itself. is_latent: the output is not
        decoded; then only the sampling rate is known.
        """
        is_audio, made = unwrap(output)
        if not is_audio:
            return None
        if is_latent:
            return {"sampling_rate": sampling_rate}

        audio = last_channel(torch.as_tensor(made))
        first_sample = 0
        num_samples = len(audio)
        for signal in reversed(self.signals):
            whole = last_channel(signal)
            place = place_of(audio, whole)
            if place is not None:
                first_sample = place
                num_samples = len(whole)
                break
        return {
            "sampling_rate": sampling_rate,
            "first_sample": first_sample,
            "num_samples": num_samples,
        }


def last_channel(x: Tensor) -> Tensor:
    """Return the last channel of the last row as float32 on the CPU: (..., N) -> (N,).

    A component may get one row after the other; then the last one was seen.
    """
    return x.flatten(0, -2)[-1].float().cpu() if x.ndim > 1 else x


def place_of(part: Tensor, whole: Tensor) -> int | None:
    """Return where `part` (n,) first occurs in `whole` (N,), None if it does not.

    >>> place_of(torch.tensor([3, 4]), torch.tensor([1, 2, 3, 4]))
    2
    """
    if len(part) > len(whole):
        return None
    beginning = part[:COMPARED]
    windows = whole[: len(whole) - len(part) + len(beginning)].unfold(0, len(beginning), 1)
    for place in (windows == beginning).all(1).nonzero()[:, 0].tolist():
        if torch.equal(whole[place : place + len(part)], part):
            return place
    return None


@contextmanager
def watch_decoders(model) -> Iterator[Decoded]:
    """Watch what the components of a HookedDiffusionModel's pipeline return, but the denoisers.

    A VAE decodes in its method `decode` and not in its forward, so both are watched. The method
    returns whole signals, where the decoder inside may get one row, or one piece, after the other.
    """
    decoded = Decoded()
    with ExitStack() as stack:
        for name, component in getattr(model.pipe, "components", {}).items():
            if not isinstance(component, nn.Module) or name in model.denoisers:
                continue
            handle = component.register_forward_hook(decoded.see)
            stack.callback(handle.remove)
            if hasattr(component, "decode"):
                stack.enter_context(watched_decode(component, decoded))
        yield decoded


@contextmanager
def watched_decode(component: nn.Module, decoded: Decoded) -> Iterator[None]:
    """Show what the component's method `decode` returns to `decoded`, as long as this lasts."""
    decode = component.decode
    before = vars(component).get("decode")  # someone may have replaced the class's method already

    def watched(*args, **kwargs):
        output = decode(*args, **kwargs)
        decoded.see(component, args, output)
        return output

    component.decode = watched
    try:
        yield
    finally:
        del component.decode
        if before is not None:
            component.decode = before
