"""The dictionary: the SAE module, what it computes, and its folder on disk.

    pre_acts = relu((x - b_dec) W_enc^T + b_enc);   top-k;   x_hat = top_acts . W_dec[top_indices] + b_dec

N vectors of width d, M latents, k of them active. Which of the pre_acts stay, `activation`:

    topk        the k largest of each vector
    batchtopk   the k N largest of a batch in training; in use those of at least `threshold`, a running mean of the smallest
                that a batch kept, set anew at the end of training; at most 8 k of a vector
    sampletopk  the k largest of a sample, that is of all tokens of one step of one prompt, as many as they are
    jumprelu    those above the latent's own threshold (only loaded, from other packages' files)

With `input_unit_norm` a vector is first given mean 0 and variance 1 over its d numbers, and x_hat
gets them back.

A folder holds `cfg.json` and `sae.safetensors` with the keys `encoder.weight (M, d)`, `encoder.bias
(M,)`, `W_dec (M, d)`, `b_dec (d,)`, and `threshold ()` or `(M,)` where there is one: the layout of
EleutherAI's sparsify, whose TopK SAEs load here as ours load there. Folders of SAELens and
dictionary_learning load too, see store/foreign_saes.py.

Sources: TopK SAEs, Gao et al. 2024 (arXiv 2406.04093); BatchTopK, Bussmann et al. 2024 (arXiv
2412.06410); sample-topk and input_unit_norm, SAeUron (arXiv 2501.18052); the folder,
https://github.com/EleutherAI/sparsify.
"""

import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from errors import UsageError
from kernels import decode, encode, keep_largest, topk
from store.disk import relative_to, save_tensors, seen_from, write_atomically, write_json


class Variant(NamedTuple):
    """What sets one `activation` apart from another."""

    together: str
    """The vectors that share their active latents in training: those of a "vector", "sample" or
    "batch"; "" can't be trained."""

    spread: int
    """A vector has at most so many times its equal share of the active latents."""

    threshold: str | None = None
    """Axes of the buffer `threshold`, which decides in use: "" one number, "M" one per latent."""


VARIANTS = {
    "topk": Variant("vector", 1),
    "batchtopk": Variant("batch", 8, ""),
    "sampletopk": Variant("sample", 8),
    "jumprelu": Variant("", 8, "M"),
}
SAFE_WEIGHTS = (
    "sae.safetensors",
    "sae_weights.safetensors",
)  # what is looked for; a pickle must be named
TRAINING_PROMPTS = "training_prompts.txt"  # in an SAE's folder: the hash of each prompt that it was trained on, one per line
UNIT_NORM = "_unitnorm"  # at the end of a file's "activation", so that sparsify refuses what it would get wrong
ROWS = 4096  # of random numbers drawn at once


class EncoderOutput(NamedTuple):
    top_acts: torch.Tensor
    """(N, k): the activations of the selected latents, unordered; a zero is not an activation."""

    top_indices: torch.Tensor
    """(N, k): which latents those are, int64."""


class UnitNormOutput(NamedTuple):
    """What `encode` gives with input_unit_norm: `EncoderOutput`, and what it takes to undo the
    normalisation."""

    top_acts: torch.Tensor
    top_indices: torch.Tensor

    mean: torch.Tensor
    """(N, 1): of each vector's numbers."""

    std: torch.Tensor
    """(N, 1)"""


class Sae(nn.Module):
    """A sparse autoencoder of `num_latents` latents, `k` active, on vectors of width `d_in`.

    Starts with random unit decoder rows, drawn from `seed`, and the encoder as the decoder's
    transpose. `cfg` is what `cfg.json` says beside these three: "activation" and "input_unit_norm",
    training options, final numbers, provenance.

    training_prompts: hashes of the prompts that it was trained on, `hash_key(prompt_key(row))` of
    each; None: not known.
    """

    training_prompts: set[str] | None = None

    def __init__(self, d_in, num_latents, k, cfg=None, seed=0):
        super().__init__()
        self.d_in, self.num_latents, self.k = d_in, num_latents, k
        self.cfg = {
            "activation": "topk",
            **(cfg or {}),
            "d_in": d_in,
            "num_latents": num_latents,
            "k": k,
        }
        self.input_unit_norm = bool(self.cfg.get("input_unit_norm"))
        self.activation = self.cfg["activation"].removesuffix(UNIT_NORM)
        self.cfg["activation"] = self.activation + UNIT_NORM * self.input_unit_norm
        if self.activation not in VARIANTS:
            raise UsageError(f"activation {self.activation!r}: expected {', '.join(VARIANTS)}")
        self.variant = VARIANTS[self.activation]
        if k < 1 or k > num_latents and not self.takes_samples:
            raise UsageError(f"k is {k}, expected 1 to num_latents = {num_latents}")
        W_dec = self.random_rows(seed)
        self.W_dec = nn.Parameter(W_dec / W_dec.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.encoder = nn.utils.skip_init(
            nn.Linear, d_in, len(W_dec)
        )  # leaves the user's random state alone
        if self.variant.threshold is not None:
            self.register_buffer(
                "threshold", torch.zeros([num_latents] * len(self.variant.threshold))
            )
        with torch.no_grad():
            self.encoder.weight.copy_(self.W_dec)
            self.encoder.bias.zero_()

    @property
    def hook_point(self):
        """The `HookPoint` of its training vectors; None where cfg.json does not say it all, as in
        other packages."""
        from store.hook_point import HookPoint

        return HookPoint.from_description(self.cfg) if "side" in self.cfg else None

    @property
    def takes_samples(self) -> bool:
        """Whether latents are chosen for all tokens of a sample together, so that `encode` needs
        whole samples."""
        return self.variant.together == "sample"

    @property
    def takes_batches(self) -> bool:
        """Whether training chooses latents for all vectors of a batch together."""
        return self.variant.together == "batch"

    def random_rows(self, seed):
        """Normal numbers that W_dec starts from."""
        return random_rows(self.num_latents, self.d_in, slice(0, self.num_latents), seed)

    def standardize(self, x):
        """x (..., d), and the mean and std (..., 1) that were taken out of it; None where
        input_unit_norm is off."""
        if not self.input_unit_norm:
            return x, None, None
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        std = centred.square().mean(-1, keepdim=True).sqrt()
        # the squares of tiny and of huge numbers are 0 and infinite, those of their shares of the
        # largest are not
        largest = centred.abs().amax(-1, keepdim=True)
        shares = centred / largest.clamp_min(torch.finfo(x.dtype).tiny)
        std = torch.where(
            (std > 1e-12) & std.isfinite(),
            std,
            largest * shares.square().mean(-1, keepdim=True).sqrt(),
        )
        std = torch.where(largest > 0, std, 1e-12)
        return centred / std, mean, std

    def sample_k(self, tokens):
        """How many latents are active on a sample of so many tokens: as many of each token as in
        training."""
        trained = self.cfg.get("tokens_per_sample") or tokens
        return max(1, round(self.k * tokens / trained))

    def width(self, tokens):
        """How many of a vector's largest pre_acts are looked at; `tokens`: vectors of a sample."""
        k = -(-self.sample_k(tokens) // max(1, tokens)) if self.takes_samples else self.k
        return min(self.variant.spread * k, self.num_latents)

    def keep(self, acts, tokens, plain_topk=False):
        """Training's choice among each vector's largest (N, K): the others are set to 0; and
        batchtopk's smallest that stays, ().

        plain_topk: every vector keeps its k largest, or, of the k of a sample, its equal share.
        """
        if not self.variant.together:
            raise UsageError(f"a {self.activation} SAE can't be trained")
        if self.variant.together == "vector":
            return acts, None
        if self.takes_batches and not plain_topk:
            return keep_largest(acts, self.k * len(acts))
        together, k = (tokens, self.sample_k(tokens)) if self.takes_samples else (1, self.k)
        if plain_topk:
            together, k = 1, -(-k // together)
        rows = acts.reshape(-1, together * acts.shape[1])
        values, places = topk(rows, min(k, rows.shape[1]))
        kept = torch.zeros_like(rows).scatter(1, places, values).view_as(acts)
        return kept, values.amin() if self.takes_batches else None

    @torch.no_grad()
    def calibrate(self, x):
        """Set the threshold of a batchtopk SAE so that the vectors x (N, d) have k active latents
        on average."""
        parts = self.standardize(x)[0].split(4096)
        acts = torch.cat([self.largest(part, self.width(1))[0] for part in parts])
        self.threshold.copy_(keep_largest(acts, self.k * len(x))[1])

    def largest(self, x, k, dtype=None):
        """The k largest pre_acts of each vector x (N, d), and their latents: (N, k), (N, k)."""
        return encode(x, self.encoder.weight, self.encoder.bias, self.b_dec, k, dtype)

    def add_up(self, top_acts, top_indices):
        """top_acts . W_dec[top_indices] + b_dec: (N, K), (N, K) -> (N, d)"""
        return decode(top_acts, top_indices, self.W_dec, self.b_dec)

    def encode(self, x, dtype=None):
        """Which latents are active on each vector, and how much: x (N, d) -> EncoderOutput.
        `dtype`: of the product, if another.

        x may also be (samples, tokens, d), and must be where `takes_samples`; the outputs are then
        (samples, tokens, K). K is k, or, where the number of active latents varies, that of the
        vector with the most; with input_unit_norm, a UnitNormOutput. Differentiable.
        """
        if self.takes_samples and x.ndim != 3:
            raise UsageError(
                f"{self.activation} expects x (samples, tokens, d), got {tuple(x.shape)}"
            )
        x, *stats = self.standardize(x.to(self.W_dec.dtype))
        vectors, tokens = x.flatten(0, -2), x.shape[-2]
        if self.variant.threshold == "M":
            pre_acts = nn.functional.linear(
                vectors - self.b_dec, self.encoder.weight, self.encoder.bias
            )
            top_acts, top_indices = longest(torch.relu(pre_acts) * (pre_acts > self.threshold))
        else:
            top_acts, top_indices = self.largest(vectors, self.width(tokens), dtype)
            if self.variant.threshold == "":
                top_acts = top_acts * (top_acts >= self.threshold)
            elif self.takes_samples:
                top_acts = top_acts * (self.keep(top_acts.detach(), tokens)[0] > 0)
            if self.variant.spread > 1:
                top_acts, places = longest(top_acts)
                top_indices = top_indices.gather(1, places)
        codes = (codes.unflatten(0, x.shape[:-1]) for codes in (top_acts, top_indices))
        return UnitNormOutput(*codes, *stats) if self.input_unit_norm else EncoderOutput(*codes)

    def decode(self, top_acts, top_indices, mean=None, std=None):
        """top_acts . W_dec[top_indices] + b_dec: (..., K), (..., K) -> x_hat (..., d); mean, std:
        see UnitNormOutput."""
        x_hat = self.add_up(top_acts.flatten(0, -2), top_indices.flatten(0, -2)).unflatten(
            0, top_acts.shape[:-1]
        )
        return x_hat if mean is None else x_hat * std + mean

    def forward(self, x):
        return self.decode(*self.encode(x))

    @torch.no_grad()
    def scale_inputs(self, scale):
        """Make this the SAE of `x` that it now is of `scale * x`; exact where scale is a power of
        two."""
        for tensor in (self.encoder.bias, self.b_dec, *self.buffers()):
            tensor.div_(scale)

    def save_to_disk(self, path):
        """Write `cfg.json`, `sae.safetensors` and, if known, `training_prompts.txt` into the folder
        `path`, each whole."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(path / "sae.safetensors", self.state_dict(), {"format": "pt"})
        self.save_description(path)

    def save_description(self, path):
        """Write what stands beside the weights, `cfg.json` last."""
        prompts = path / TRAINING_PROMPTS
        if self.training_prompts is None:
            prompts.unlink(missing_ok=True)
        else:
            write_atomically(
                prompts, "".join(f"{line}\n" for line in sorted(self.training_prompts)).encode()
            )
        from store.identity import fingerprint_tensors

        record = dict(self.cfg)
        record["sae_fingerprint"] = fingerprint_tensors(load_file(path / "sae.safetensors"))
        if self.training_prompts is not None:
            record["num_training_prompts"] = len(self.training_prompts)
        if "data" in record:  # the folder knows its own data wherever it is read from
            record["data"] = [relative_to(name, path) for name in record["data"]]
            record["data_relative_to"] = "this folder"
        write_json(path / "cfg.json", record)

    @staticmethod
    def load_from_disk(path, device="cpu"):
        """Read an SAE folder of ours, sparsify, universal-diffsae, SAELens or dictionary_learning;
        weights come as float32.

        `path` is the folder, or the file with the weights in it. A pickle is read only here, and
        only as tensors: dictionary_learning's ae.pt. Raises UsageError for one that computes
        something else (transcoders, groupmax, skip connections, the ancestor's batch_topk,
        sample_topk and input_unit_norm, which it did not save whole, variants and other keys of
        cfg.json that this version does not know; store/foreign_saes.py says what of other
        packages), OSError where a file is not there.
        """
        from store.foreign_saes import find_weights, read_foreign
        from store.identity import fingerprint_tensors

        weights = find_weights(path)
        path = weights.parent
        if weights.name != "sae.safetensors":
            return build(*read_foreign(weights), weights).to(device)
        try:
            cfg = json.loads((path / "cfg.json").read_text())
            tensors = load_file(weights)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise UsageError(f"{path} is not a readable SAE folder: {error}") from None
        if not isinstance(cfg, dict):
            raise UsageError(f"{path / 'cfg.json'}: expected a JSON object")
        check_description(path / "cfg.json", cfg)
        data = cfg.get("data") or []
        if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
            raise UsageError(f"{path / 'cfg.json'} says data {data!r}; expected a list of paths")
        if cfg.pop("data_relative_to", None):
            cfg["data"] = [seen_from(path, name) for name in data]
        num_training_prompts = cfg.pop("num_training_prompts", None)
        described = cfg.pop("sae_fingerprint", None)  # sparsify and earlier versions write none
        if described is not None and described != fingerprint_tensors(tensors):
            print(
                f"note: {weights} does not hold the weights that its cfg.json describes: they were "
                "edited or exchanged",
                file=sys.stderr,
            )
        state = {name: tensor.float() for name, tensor in tensors.items()}
        sae = build(cfg, state, weights).to(device)
        sae.training_prompts = read_training_prompts(path, num_training_prompts)
        return sae

    @staticmethod
    def load_many(folder, pattern=None, device="cpu"):
        """Every SAE in a folder and below it: {`HookPoint.file_name`: Sae}, the hook name where it
        takes what the module returns in conditional rows; or {path relative to `folder`: Sae} where
        these are missing or repeat. `pattern`: a glob on that path (`*` crosses slashes). Pickles
        are left out: name their folder to `load_from_disk`. Raises UsageError if there is no SAE,
        or one can't be loaded.
        """
        names = sae_folders(folder)
        saes = {
            n: Sae.load_from_disk(path, device)
            for n, path in names.items()
            if pattern is None or fnmatch(n, pattern)
        }
        if not saes:
            raise UsageError(
                f"{folder} has no SAE"
                + (f" in a folder {pattern!r}, only in {', '.join(names)}" if names else "")
            )
        points = {
            sae.hook_point.file_name if sae.hook_point else sae.cfg.get("hook_name"): sae
            for sae in saes.values()
        }
        return saes if None in points or len(points) < len(saes) else points

    @staticmethod
    def load_from_hub(repo_id, hook_name=None, device="cpu"):
        """The SAE at the top of a model repository on the Hugging Face Hub, or the one in its
        folder `hook_name`.

        Only its description and weights are downloaded, never a pickle. Raises as `load_from_disk`
        does, and OSError where the repository can't be had.
        """
        from store.hub import download

        return Sae.load_from_disk(download(repo_id, hook_name), device)


def read_training_prompts(folder: Path, count: int | None) -> set[str] | None:
    """The hashes of the prompts that an SAE was trained on, `count` by its cfg.json; None where its
    folder does not say.

    Raises UsageError for a file that is damaged or missing.
    """
    path = folder / TRAINING_PROMPTS
    if not path.exists() and count is None:
        return None
    found = path.read_text("ascii", errors="replace").split() if path.exists() else []
    if len(found) != count or not all(re.fullmatch("[0-9a-f]{16}", line) for line in found):
        raise UsageError(
            f"{path} is damaged, so it is not known which prompts the SAE has seen; train it again"
        )
    return set(found)


def sae_folders(folder) -> dict[str, Path]:
    """{path relative to `folder`: SAE folder} of every SAE in it and below it; folders with a
    pickle alone are left out."""
    folders = {path.parent for name in SAFE_WEIGHTS for path in Path(folder).rglob(name)}
    return {path.relative_to(folder).as_posix(): path for path in sorted(folders)}


def newest_sae(root="saes") -> Path:
    """The SAE folder whose cfg.json was written last, of all below `root`, at any depth; UsageError
    if there is none."""
    folders = [folder for folder in sae_folders(root).values() if (folder / "cfg.json").exists()]
    if not folders:
        raise UsageError(f"no SAE in {root}/: run train.py first, or name one with --sae")
    return max(folders, key=lambda folder: (folder / "cfg.json").stat().st_mtime_ns)


def check_description(path, cfg):
    """Raise UsageError for a cfg.json of ours, sparsify's or universal-diffsae's whose SAE would
    compute something else here."""
    from store.foreign_saes import OUR_KEYS, SPARSIFY_KEYS, check_keys

    activation = str(cfg.get("activation", "topk"))
    unit_norm = "input_unit_norm" if activation.endswith(UNIT_NORM) else ""
    refused = {
        "transcode",
        "skip_connection",
        "batch_topk",
        "sample_topk",
        "signed",
        "input_unit_norm",
    } - {unit_norm}
    for key in sorted(refused):
        if cfg.get(key):
            raise UsageError(
                f"{path} says {key}, which no file of this project does; it can't be loaded"
            )
    training = cfg.get("training")
    made_by_train = (
        isinstance(training, dict) and "digest" in training
    )  # of any version, each with keys of its own
    if not made_by_train:
        check_keys(path, cfg, SPARSIFY_KEYS | OUR_KEYS)


def build(cfg, state, weights):
    """The SAE of a description and its tensors, which came from the file `weights`; UsageError
    where they don't fit."""
    activation = str(cfg.get("activation", "topk")).removesuffix(UNIT_NORM)
    if activation not in VARIANTS:
        raise UsageError(
            f"{weights.parent / 'cfg.json'} says activation {activation!r}; expected {', '.join(VARIANTS)}"
        )
    M, d = state["W_dec"].shape if "W_dec" in state and state["W_dec"].ndim == 2 else (0, 0)
    expected = {"encoder.weight": (M, d), "encoder.bias": (M,), "W_dec": (M, d), "b_dec": (d,)}
    threshold = VARIANTS[activation].threshold
    if threshold is not None:
        expected["threshold"] = (M,) * len(threshold)
    sizes_fit = (
        cfg.get("d_in", d) == d and (cfg.get("num_latents") or M) == M
    )  # sparsify's 0 is d times expansion_factor
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected or not sizes_fit:
        shapes = ", ".join(f"{name} {shape}" for name, shape in expected.items())
        raise UsageError(f"{weights}: expected {shapes}")
    k = cfg.get("k")
    if not isinstance(k, int) or isinstance(k, bool):
        raise UsageError(f"{weights.parent}: k is {k!r}, expected an integer")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UsageError(f"{weights} holds NaN or infinity")
    sae = Sae(d, M, k, cfg)
    sae.load_state_dict(state)
    return sae


def random_rows(num_latents, d, own, seed):
    """Rows `own` (a slice) of a matrix (num_latents, d) of normal numbers drawn from `seed`."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for start in range(0, own.stop, ROWS):
        block = torch.randn(min(ROWS, num_latents - start), d, generator=generator)
        parts.append(block[max(0, own.start - start) : own.stop - start])
    return torch.cat(parts)


def longest(acts):
    """acts (N, M), mostly 0: each vector's nonzero numbers first and their places, both as wide as
    the most that one has."""
    return acts.topk(max(1, int((acts > 0).sum(1).max())), dim=1)
