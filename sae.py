"""A sparse autoencoder (SAE): what it computes, its variants, and its folder on disk.

    pre_acts = relu((x - b_dec) @ W_enc.T + b_enc)                  (N, M)
    top_acts, top_indices = the k largest pre_acts of each vector   (N, k)
    x_hat = top_acts @ W_dec[top_indices] + b_dec                   (N, d)

x are N vectors of width d. The SAE has M = num_latents latents, of which k are active. W_enc is
`encoder.weight`, b_enc is `encoder.bias`.

    sae = Sae.load_from_disk("saes/mid_block_k16_M384")
    top_acts, top_indices = sae.encode(x)
    x_hat = sae.decode(top_acts, top_indices)                       # the same as sae(x)

`activation` decides which pre_acts stay active; the others become 0:

    activation   in training                           in use
    topk         the k largest of each vector          the same
    batchtopk    the k N largest of a batch            those of at least `threshold`
    sampletopk   the k largest of a sample             the same
    jumprelu     (can't be trained here)               those above their latent's own threshold

batchtopk: `threshold` is a running mean of the smallest pre_act that a batch kept; the end of
training sets it anew. sampletopk: a sample is all tokens of one step of one prompt. In both, a
vector has at most 8 times its equal part of the active latents. jumprelu SAEs come from other
packages' files.

`input_unit_norm` can be added to each. A vector is then given mean 0 and variance 1 over its d
numbers before all else, and x_hat gets its mean and standard deviation back.

A folder holds `cfg.json` and `sae.safetensors` with the keys `encoder.weight (M, d)`, `encoder.bias
(M,)`, `W_dec (M, d)`, `b_dec (d,)`, and for batchtopk `threshold ()`, for jumprelu `threshold
(M,)`. This is the layout of EleutherAI's sparsify, whose TopK SAEs load here as ours load there.
Folders of SAELens and dictionary_learning load too, see store/foreign_saes.py.

Sources: TopK SAEs, Gao et al. 2024 (arXiv 2406.04093); BatchTopK, Bussmann et al. 2024 (arXiv
2412.06410); sample-topk and input_unit_norm, SAeUron (arXiv 2501.18052); the folder,
https://github.com/EleutherAI/sparsify.
"""

import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from errors import UsageError
from kernels import decode, encode, keep_largest, topk
from store.disk import relative_to, save_tensors, seen_from, write_atomically, write_json

if TYPE_CHECKING:
    from store.hook_point import HookPoint


class Variant(NamedTuple):
    """What sets one `activation` apart from another; see the table at the top."""

    k_is_per: Literal["vector", "batch", "sample", ""]
    """The vectors that share their active latents in training; "" can't be trained."""

    max_multiple: int
    """A vector has at most this many times its equal part of the active latents."""

    threshold: Literal["one", "per latent"] | None = None
    """Whether the SAE has a buffer `threshold`, () or (M,), that decides in use."""


VARIANTS = {
    "topk": Variant("vector", 1),
    "batchtopk": Variant("batch", 8, "one"),
    "sampletopk": Variant("sample", 8),
    "jumprelu": Variant("", 8, "per latent"),
}

# The files that say that a folder holds an SAE. A pickle is not among them; it must be named.
SAFE_WEIGHTS = ("sae.safetensors", "sae_weights.safetensors")

# This file in an SAE's folder holds the hash of each prompt that it was trained on, one per line.
TRAINING_PROMPTS = "training_prompts.txt"

# input_unit_norm adds this to a file's "activation", so that sparsify refuses the file: it would
# compute something else.
UNIT_NORM = "_unitnorm"

# cfg.json may say these of another package, or of this project's ancestor, whose SAEs compute
# something else.
REFUSED_KEYS = (
    "batch_topk",
    "input_unit_norm",
    "sample_topk",
    "signed",
    "skip_connection",
    "transcode",
)

ROWS_AT_ONCE = 4096  # of random numbers, or vectors, in memory


class EncoderOutput(NamedTuple):
    """What `Sae.encode` returns. K is k, or the largest number of active latents of a vector."""

    top_acts: Tensor
    """(N, K): the activations of the selected latents, unordered; a zero is not an activation."""

    top_indices: Tensor
    """(N, K): which latents those are, int64."""


class UnitNormOutput(NamedTuple):
    """What `Sae.encode` returns with input_unit_norm: also what undoes the normalisation."""

    top_acts: Tensor
    """(N, K), as in EncoderOutput."""

    top_indices: Tensor
    """(N, K), as in EncoderOutput."""

    mean: Tensor
    """(N, 1): the mean of each vector's numbers."""

    std: Tensor
    """(N, 1): their standard deviation."""


class Sae(nn.Module):
    """A sparse autoencoder with `num_latents` latents, `k` of them active, for width `d_in`.

    A new one has random decoder rows of length 1, drawn from `seed`, and the decoder's transpose as
    encoder. `cfg` is what `cfg.json` says beside d_in, num_latents and k: "activation" and
    "input_unit_norm", training options, final numbers, provenance. Raises UsageError for an
    unknown activation, or a k outside of 1 to num_latents (sampletopk: its k can be larger, since
    it is for a whole sample).
    """

    training_prompts: set[str] | None = None
    """The hash `hash_key` of each of the `prompt_keys` that it was trained on; None if unknown."""

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        cfg: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.d_in = d_in
        self.num_latents = num_latents
        self.k = k

        self.cfg = {"activation": "topk"}
        self.cfg.update(cfg or {})
        self.cfg.update(d_in=d_in, num_latents=num_latents, k=k)
        self.input_unit_norm = bool(self.cfg.get("input_unit_norm"))
        self.activation = self.cfg["activation"].removesuffix(UNIT_NORM)
        if self.input_unit_norm:
            self.cfg["activation"] = self.activation + UNIT_NORM
        else:
            self.cfg["activation"] = self.activation

        if self.activation not in VARIANTS:
            raise UsageError(f"activation {self.activation!r}: expected {', '.join(VARIANTS)}")
        self.variant = VARIANTS[self.activation]
        if k < 1 or (k > num_latents and not self.takes_samples):
            raise UsageError(f"k is {k}, expected 1 to num_latents = {num_latents}")

        W_dec = self.random_rows(seed)
        num_rows = len(W_dec)  # fewer than num_latents where processes split the latents
        self.W_dec = nn.Parameter(W_dec / W_dec.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        # without PyTorch's own random start, so that the user's random state stays as it is
        self.encoder = nn.utils.skip_init(nn.Linear, d_in, num_rows)
        with torch.no_grad():
            self.encoder.weight.copy_(self.W_dec)
            self.encoder.bias.zero_()
        if self.variant.threshold is not None:
            shape = threshold_shape(self.variant, num_latents)
            self.register_buffer("threshold", torch.zeros(shape))

    @property
    def hook_point(self) -> "HookPoint | None":
        """The HookPoint of the training vectors, None where cfg.json does not say all of it.

        Other packages' files do not.
        """
        from store.hook_point import HookPoint  # computing with an SAE needs no activation files

        if "side" not in self.cfg:
            return None
        return HookPoint.from_description(self.cfg)

    @property
    def takes_samples(self) -> bool:
        """Whether latents are chosen for all tokens of a sample together.

        `encode` then needs whole samples, (samples, tokens, d).
        """
        return self.variant.k_is_per == "sample"

    @property
    def takes_batches(self) -> bool:
        """Whether training chooses latents for all vectors of a batch together."""
        return self.variant.k_is_per == "batch"

    def random_rows(self, seed: int) -> Tensor:
        """Return the normal numbers that W_dec starts from, (M, d)."""
        return random_rows(self.num_latents, self.d_in, slice(0, self.num_latents), seed)

    def forward(self, x: Tensor) -> Tensor:
        """Return x_hat for x; see `encode` for the shapes."""
        return self.decode(*self.encode(x))

    def encode(self, x: Tensor, dtype: torch.dtype | None = None) -> EncoderOutput | UnitNormOutput:
        """Return which latents are active on each vector, and how much; with gradients.

        x is (N, d), or (samples, tokens, d), as it must be where `takes_samples`; the outputs are
        then (samples, tokens, K). K is k, or, where the number of active latents varies, that of
        the vector with the most. dtype: that of the product x @ W_enc.T, if it is to be another
        than the weights'. With input_unit_norm it returns a UnitNormOutput. Raises UsageError for
        vectors without samples where whole samples are needed.
        """
        if self.takes_samples and x.ndim != 3:
            raise UsageError(
                f"{self.activation} expects x (samples, tokens, d), got {tuple(x.shape)}"
            )
        x, mean, std = self.standardize(x.to(self.W_dec.dtype))
        top_acts, top_indices = self.select(x.flatten(0, -2), x.shape[-2], dtype)

        top_acts = top_acts.unflatten(0, x.shape[:-1])
        top_indices = top_indices.unflatten(0, x.shape[:-1])
        if self.input_unit_norm:
            return UnitNormOutput(top_acts, top_indices, mean, std)
        return EncoderOutput(top_acts, top_indices)

    def decode(
        self,
        top_acts: Tensor,
        top_indices: Tensor,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """Return x_hat = top_acts @ W_dec[top_indices] + b_dec: (..., K), (..., K) -> (..., d).

        mean, std (..., 1): from a UnitNormOutput; x_hat is then x_hat * std + mean.
        """
        x_hat = self.add_up(top_acts.flatten(0, -2), top_indices.flatten(0, -2))
        x_hat = x_hat.unflatten(0, top_acts.shape[:-1])
        if mean is None:
            return x_hat
        return x_hat * std + mean

    def select(self, x: Tensor, tokens: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Return top_acts and top_indices (N, K) of standardized vectors x (N, d), in use.

        tokens: the vectors of a sample.
        """
        if self.variant.threshold == "per latent":
            pre_acts = nn.functional.linear(x - self.b_dec, self.encoder.weight, self.encoder.bias)
            return nonzero_first(torch.relu(pre_acts) * (pre_acts > self.threshold))

        top_acts, top_indices = self.largest(x, self.width(tokens), dtype)
        if self.variant.threshold == "one":
            top_acts = top_acts * (top_acts >= self.threshold)
        elif self.takes_samples:
            kept, _ = self.keep(top_acts.detach(), tokens)
            top_acts = top_acts * (kept > 0)

        if self.variant.max_multiple > 1:
            top_acts, columns = nonzero_first(top_acts)
            top_indices = top_indices.gather(1, columns)
        return top_acts, top_indices

    def standardize(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return x (..., d) with mean 0 and variance 1, and the mean and std (..., 1) of before.

        Where input_unit_norm is off it returns x, None, None. A vector of equal numbers becomes 0,
        with a std of 1e-12.
        """
        if not self.input_unit_norm:
            return x, None, None
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        std = centred.square().mean(-1, keepdim=True).sqrt()

        # The squares of tiny numbers are 0 and those of huge ones are infinite. The squares of
        # their fractions of the largest number are neither.
        largest = centred.abs().amax(-1, keepdim=True)
        fractions = centred / largest.clamp_min(torch.finfo(x.dtype).tiny)
        safe_std = largest * fractions.square().mean(-1, keepdim=True).sqrt()
        is_safe = (std > 1e-12) & std.isfinite()
        std = torch.where(is_safe, std, safe_std)
        std = torch.where(largest > 0, std, 1e-12)
        return centred / std, mean, std

    def sample_k(self, tokens: int) -> int:
        """Return how many latents are active on a sample with this many tokens.

        It is the number per token of the training: an SAE with k = 100, trained on samples of 50
        tokens, has 20 active latents on a sample of 10.
        """
        tokens_in_training = self.cfg.get("tokens_per_sample") or tokens
        return max(1, round(self.k * tokens / tokens_in_training))

    def width(self, tokens: int) -> int:
        """Return how many of a vector's largest pre_acts can be active at most.

        It is k for topk, 8 k for batchtopk, and 8 times the rounded-up k per token for sampletopk.
        tokens: the vectors of a sample.
        """
        k = self.k
        if self.takes_samples:
            k = divide_rounding_up(self.sample_k(tokens), max(1, tokens))
        return min(self.variant.max_multiple * k, self.num_latents)

    def keep(
        self, acts: Tensor, tokens: int, plain_topk: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return acts (N, K) with 0 for what training does not choose, and batchtopk's minimum.

        acts: each vector's largest pre_acts, `width` of them. The minimum is the smallest number
        that stayed, (); the other variants return None for it. plain_topk: every vector keeps its
        own k largest or, if k is for a sample, its equal part of them. Raises UsageError for
        a jumprelu SAE.
        """
        if not self.variant.k_is_per:
            raise UsageError(f"a {self.activation} SAE can't be trained")
        if self.variant.k_is_per == "vector":
            return acts, None
        if self.takes_batches and not plain_topk:
            return keep_largest(acts, self.k * len(acts))

        vectors_together = 1
        k = self.k
        if self.takes_samples:
            vectors_together = tokens
            k = self.sample_k(tokens)
        if plain_topk:
            k = divide_rounding_up(k, vectors_together)
            vectors_together = 1

        rows = acts.reshape(-1, vectors_together * acts.shape[1])
        values, columns = topk(rows, min(k, rows.shape[1]))
        kept = torch.zeros_like(rows).scatter(1, columns, values).view_as(acts)
        minimum = values.amin() if self.takes_batches else None
        return kept, minimum

    def largest(self, x: Tensor, k: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return the k largest pre_acts of each vector x (N, d), and their latents: (N, k) each."""
        return encode(x, self.encoder.weight, self.encoder.bias, self.b_dec, k, dtype)

    def add_up(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Return top_acts @ W_dec[top_indices] + b_dec: (N, K), (N, K) -> (N, d)."""
        return decode(top_acts, top_indices, self.W_dec, self.b_dec)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set a batchtopk SAE's threshold so that vectors x (N, d) have k active on average."""
        standardized, _, _ = self.standardize(x)
        acts = []
        for block in standardized.split(ROWS_AT_ONCE):
            block_acts, _ = self.largest(block, self.width(1))
            acts.append(block_acts)
        _, minimum = keep_largest(torch.cat(acts), self.k * len(x))
        self.threshold.copy_(minimum)

    @torch.no_grad()
    def scale_inputs(self, scale: float) -> None:
        """Turn an SAE that takes scale * x into the same SAE that takes x.

        It divides the biases and the threshold by `scale`, which is exact for a power of two.
        """
        for tensor in (self.encoder.bias, self.b_dec, *self.buffers()):
            tensor.div_(scale)

    def save_to_disk(self, path: str | Path) -> None:
        """Write the folder `path`: sae.safetensors, cfg.json and, if known, training_prompts.txt.

        Each file is either complete or not there. Raises OSError if one can't be written.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_tensors(path / "sae.safetensors", self.state_dict(), {"format": "pt"})
        self.save_description(path)

    def save_description(self, path: Path) -> None:
        """Write the files beside the weights: training_prompts.txt, and cfg.json last, without
        which the folder is no finished SAE."""
        from store.identity import fingerprint_tensors

        prompts = path / TRAINING_PROMPTS
        if self.training_prompts is None:
            prompts.unlink(missing_ok=True)
        else:
            text = "".join(f"{line}\n" for line in sorted(self.training_prompts))
            write_atomically(prompts, text.encode())

        record = dict(self.cfg)
        record["sae_fingerprint"] = fingerprint_tensors(load_file(path / "sae.safetensors"))
        if self.training_prompts is not None:
            record["num_training_prompts"] = len(self.training_prompts)

        if "data" in record:  # relative, so that the folder can be moved together with its data
            record["data"] = [relative_to(name, path) for name in record["data"]]
            record["data_relative_to"] = "this folder"
        write_json(path / "cfg.json", record)

    @staticmethod
    def load_from_disk(path: str | Path, device: str | torch.device = "cpu") -> "Sae":
        """Read an SAE folder. Weights become float32.

        The folder can be from this project, sparsify, universal-diffsae, SAELens or
        dictionary_learning.
        `path` is the folder, or the file with the weights in it. A pickle is read only here, and
        only as tensors: dictionary_learning's ae.pt. Raises OSError if a file is not there, and
        UsageError if the folder is damaged or its SAE computes something else: transcoders,
        groupmax, skip connections; batch_topk, sample_topk and input_unit_norm of this project's
        ancestor, which did not save them whole; variants and keys of cfg.json that this version
        does not know. store/foreign_saes.py says what is refused of other packages.
        """
        from store.foreign_saes import find_weights, read_foreign  # training needs none of it
        from store.identity import fingerprint_tensors

        weights = find_weights(path)
        folder = weights.parent
        if weights.name != "sae.safetensors":
            cfg, state = read_foreign(weights)
            return build(cfg, state, weights).to(device)

        try:
            cfg = json.loads((folder / "cfg.json").read_text())
            tensors = load_file(weights)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise UsageError(f"{folder} is not a readable SAE folder: {error}") from None
        check_description(folder / "cfg.json", cfg)

        if cfg.pop("data_relative_to", None):
            cfg["data"] = [seen_from(folder, name) for name in cfg.get("data") or []]
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
        sae.training_prompts = read_training_prompts(folder, num_training_prompts)
        return sae

    @staticmethod
    def load_many(
        folder: str | Path, pattern: str | None = None, device: str | torch.device = "cpu"
    ) -> dict[str, "Sae"]:
        """Read every SAE in a folder and below it, by the name of its hook point.

        The name is `HookPoint.file_name`, which is the hook name for what the module returns in
        conditional rows. Where names are missing or repeat, it is the path relative to `folder`.
        pattern: a glob on that path; its `*` crosses slashes. Pickles are left out: give their
        folder to `load_from_disk`. Raises UsageError if there is no SAE, or one can't be loaded.
        """
        folders = find_sae_folders(folder)
        saes = {}
        for name, path in folders.items():
            if pattern is None or fnmatch(name, pattern):
                saes[name] = Sae.load_from_disk(path, device)
        if not saes:
            others = ""
            if folders:
                others = f" in a folder {pattern!r}, only in {', '.join(folders)}"
            raise UsageError(f"{folder} has no SAE{others}")

        by_hook_point = {}
        for sae in saes.values():
            if sae.hook_point is not None:
                by_hook_point[sae.hook_point.file_name] = sae
            else:
                by_hook_point[sae.cfg.get("hook_name")] = sae
        if None in by_hook_point or len(by_hook_point) < len(saes):
            return saes
        return by_hook_point

    @staticmethod
    def load_from_hub(
        repo_id: str, hook_name: str | None = None, device: str | torch.device = "cpu"
    ) -> "Sae":
        """Read the SAE at the top of a model repository on the Hugging Face Hub.

        hook_name: read the one in this folder of the repository instead.
        Only its description and weights are downloaded, never a pickle. Raises as `load_from_disk`
        does, and OSError if the repository can't be had.
        """
        from store.hub import download  # it imports huggingface_hub, which takes a while, and sae

        return Sae.load_from_disk(download(repo_id, hook_name), device)


def threshold_shape(variant: Variant, num_latents: int) -> tuple[int, ...]:
    """Return the shape of a variant's buffer `threshold`: () for one number, (M,) per latent."""
    if variant.threshold == "per latent":
        return (num_latents,)
    return ()


def divide_rounding_up(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up: 7 and 2 give 4."""
    return -(-number // divisor)


def random_rows(num_latents: int, d: int, rows: slice, seed: int) -> Tensor:
    """Return the rows `rows` of a matrix (num_latents, d) of normal numbers drawn from `seed`.

    Blocks of rows are drawn one after another, so that a process that needs a slice never holds the
    whole matrix, and gets the same numbers as one that needs all.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, rows.stop, ROWS_AT_ONCE):
        num_rows = min(ROWS_AT_ONCE, num_latents - start)
        block = torch.randn(num_rows, d, generator=generator)
        blocks.append(block[max(0, rows.start - start) : rows.stop - start])
    return torch.cat(blocks)


def nonzero_first(acts: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest numbers and their columns, as many as the fullest row has nonzero.

    acts: (N, M), none negative. For [[0, 2, 0], [3, 0, 1]] it gives [[2, 0], [3, 1]] and
    [[1, 0], [0, 2]].
    """
    most = int((acts > 0).sum(1).max())
    return acts.topk(max(1, most), dim=1)


def read_training_prompts(folder: Path, count: int | None) -> set[str] | None:
    """Return the hashes of the prompts that an SAE was trained on; None if its folder has none.

    count: how many there are by cfg.json. Raises UsageError if the file is damaged or missing.
    """
    path = folder / TRAINING_PROMPTS
    exists = path.exists()
    if not exists and count is None:
        return None
    hashes = path.read_text("ascii", errors="replace").split() if exists else []
    if len(hashes) != count or not all(re.fullmatch("[0-9a-f]{16}", line) for line in hashes):
        raise UsageError(
            f"{path} is damaged, so it is not known which prompts the SAE has seen; train it again"
        )
    return set(hashes)


def find_sae_folders(folder: str | Path) -> dict[str, Path]:
    """Return {path relative to `folder`: path} of every SAE folder in it and below it, sorted.

    The folder itself is ".". Folders that hold only a pickle are left out.
    """
    folders: set[Path] = set()
    for name in SAFE_WEIGHTS:
        folders.update(path.parent for path in Path(folder).rglob(name))
    return {path.relative_to(folder).as_posix(): path for path in sorted(folders)}


def newest_sae(root: str | Path = "saes") -> Path:
    """Return the SAE folder below `root`, at any depth, whose cfg.json was written last.

    Raises UsageError if there is none.
    """
    folders = [
        folder for folder in find_sae_folders(root).values() if (folder / "cfg.json").exists()
    ]
    if not folders:
        raise UsageError(f"no SAE in {root}/: run train.py first, or name one with --sae")
    return max(folders, key=lambda folder: (folder / "cfg.json").stat().st_mtime_ns)


def check_description(path: Path, cfg: object) -> None:
    """Raise UsageError for a cfg.json that is damaged, or whose SAE would compute something else.

    It is for cfg.json of this project, sparsify and universal-diffsae.
    """
    from store.foreign_saes import OUR_KEYS, SPARSIFY_KEYS, check_keys

    if not isinstance(cfg, dict):
        raise UsageError(f"{path}: expected a JSON object")

    has_unit_norm = str(cfg.get("activation", "topk")).endswith(UNIT_NORM)
    for key in REFUSED_KEYS:
        is_ours = key == "input_unit_norm" and has_unit_norm
        if cfg.get(key) and not is_ours:
            raise UsageError(
                f"{path} says {key}, which no file of this project does; it can't be loaded"
            )

    # every version of train.py writes "training", with options of its own
    training = cfg.get("training")
    is_made_by_train = isinstance(training, dict) and "digest" in training
    if not is_made_by_train:
        check_keys(path, cfg, SPARSIFY_KEYS | OUR_KEYS)

    data = cfg.get("data") or []
    if not isinstance(data, list) or not all(isinstance(name, str) for name in data):
        raise UsageError(f"{path} says data {data!r}; expected a list of paths")


def build(cfg: dict[str, Any], state: dict[str, Tensor], weights: Path) -> Sae:
    """Return the SAE with a description and the tensors of the file `weights`.

    Raises UsageError if they do not fit together, or a tensor holds NaN or infinity.
    """
    activation = str(cfg.get("activation", "topk")).removesuffix(UNIT_NORM)
    if activation not in VARIANTS:
        raise UsageError(
            f"{weights.parent / 'cfg.json'} says activation {activation!r}; "
            f"expected {', '.join(VARIANTS)}"
        )
    check_shapes(cfg, state, VARIANTS[activation], weights)
    k = cfg.get("k")
    if not isinstance(k, int) or isinstance(k, bool):
        raise UsageError(f"{weights.parent}: k is {k!r}, expected an integer")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UsageError(f"{weights} holds NaN or infinity")

    num_latents, d = state["W_dec"].shape
    sae = Sae(d, num_latents, k, cfg)
    sae.load_state_dict(state)
    return sae


def check_shapes(
    cfg: dict[str, Any], state: dict[str, Tensor], variant: Variant, weights: Path
) -> None:
    """Raise UsageError unless the tensors are those of a variant, with the sizes of cfg.json."""
    M, d = 0, 0
    if "W_dec" in state and state["W_dec"].ndim == 2:
        M, d = state["W_dec"].shape
    expected = {"encoder.weight": (M, d), "encoder.bias": (M,), "W_dec": (M, d), "b_dec": (d,)}
    if variant.threshold is not None:
        expected["threshold"] = threshold_shape(variant, M)

    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    num_latents = cfg.get("num_latents") or M  # sparsify's 0 means d times expansion_factor
    if shapes != expected or cfg.get("d_in", d) != d or num_latents != M:
        described = ", ".join(f"{name} {shape}" for name, shape in expected.items())
        raise UsageError(f"{weights}: expected {described}")
