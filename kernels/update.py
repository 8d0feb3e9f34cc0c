"""One training update of an SAE: forward, backward with gradients written out by hand, and the
optimizer's step.

    update = SparseUpdate(sae, variance)
    update.list_dead()                         now and then: which latents AuxK brings back
    forward = update.forward(x)
    gradients = update.backward(forward)
    grad_norm = update.step(gradients, lr)     only this one changes weights and state

    loss      = (|x - x_hat|^2 / variance + auxk_alpha * AuxK / residual) / n       summed over the update's n vectors
    x_hat     = top_acts . W_dec[top_indices] + b_dec
    e         = x_hat - x;   s = 2 / (n variance)                                   s e = d loss / d x_hat (n, d)
    d_acts    = s e . W_dec[top_indices] where top_acts > 0                         d loss / d top_acts    (n, K)
    dW_dec[m] = sum of s top_acts e over the pairs (vector, place) of latent m;     db_dec    = sum of s e - db_enc W_enc
    dW_enc[m] = sum of d_acts (x - b_dec) over the same pairs;                      db_enc[m] = sum of d_acts

Several reconstructions of a vector (Multi-TopK, Matryoshka) give as many times more pairs. Nothing
of size (n, M) is made but the product that latents are chosen from, and that by blocks. A row of
the two matrices' gradients is the sum over a few pairs, so cheap that large gradients are made
twice, block by block: once for the norm that clips them and once where Adam uses them
(kernels/adam.py). They never exist as a whole. Nothing waits for the device but `list_dead`.

The SAE, `sae.Sae`, is asked for what its variant does: `standardize`, `width`, `keep`,
`takes_samples`, `takes_batches`.

Sources: TopK, AuxK and Multi-TopK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4, A.2 and
A.3; BatchTopK, Bussmann et al. 2024 (arXiv 2412.06410); Matryoshka SAEs, Bussmann et al. 2025
(arXiv 2503.17547).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.adam import adam, squared_norm, sum_over, update_rows
from kernels.decode import decode_error
from kernels.encode import Selector
from kernels.grad import KEPT, Gradient, count_active, sort_pairs, totals, weighted_sum
from kernels.topk import topk

LIST_DEAD_EVERY = 16  # updates; listing the dead latents waits for the device
WINDOW = 10  # updates over which the threshold of a batchtopk SAE is averaged


class Reconstruction(NamedTuple):
    """One x_hat that the loss compares with x. There are several in Multi-TopK and Matryoshka; the
    last one is the SAE's own."""

    share: float
    """Its weight in the loss."""

    top_acts: torch.Tensor
    """(n, K): zeros are not active"""

    top_indices: torch.Tensor
    """(n, K) int64: rows of W_dec"""

    e: torch.Tensor
    """(n, d): x_hat - x"""

    d_acts: torch.Tensor
    """(n, K): e . W_dec[top_indices] where top_acts > 0, else 0"""


class AuxK(NamedTuple):
    """What the dead latents predict of the error that the others leave over."""

    loss: torch.Tensor
    """()"""

    dead: torch.Tensor
    """(C,) int64, rising: the listed latents, padded with M"""

    acts: torch.Tensor
    """(n, C): their activations, the k_aux largest of each vector"""

    left: torch.Tensor
    """(n, d): e + e_hat, what is left over after them"""

    scale: torch.Tensor
    """(n, 1): loss = sum of scale |left|^2"""


class Forward(NamedTuple):
    loss: torch.Tensor
    """(): of the update's vectors, before it"""

    x: torch.Tensor
    """(n, d): the vectors that were given"""

    e: torch.Tensor
    """(n, d): x_hat - x"""

    top_acts: torch.Tensor
    """(n, K): zeros are not active"""

    top_indices: torch.Tensor
    """(n, K) int64"""

    num_vectors: int
    """The update's vectors, of all processes."""

    centred: torch.Tensor
    """(n, d): x - b_dec, after input_unit_norm"""

    slope: torch.Tensor
    """(n, 1): d loss / d x_hat = slope * e, for a reconstruction with share 1"""

    reconstructions: list[Reconstruction]

    auxk: AuxK | None
    """None while no latent is dead."""

    least: torch.Tensor | None
    """(): the smallest activation that a batchtopk SAE kept; None for other variants"""

    active: torch.Tensor
    """(M,) float: above 0 for latents that were active"""

    square: torch.Tensor
    """(): |x - x_hat|^2 / (n variance), summed over the update's vectors"""

    @property
    def x_hat(self) -> torch.Tensor:
        """(n, d)"""
        return self.x + self.e


class Gradients(NamedTuple):
    forward: Forward
    """What these are the gradients of."""

    W_enc: Gradient
    b_enc: torch.Tensor
    """(M,)"""

    W_dec: Gradient
    b_dec: torch.Tensor
    """(d,)"""

    along: torch.Tensor | None
    """(M,): W_dec.grad[m] . W_dec[m], which unit norm takes out; None without normalize_decoder"""


class SparseUpdate:
    """Updates an SAE in place.

    variance: mean |x - mean|^2 of the vectors, what the squared error is divided by. auxk_alpha:
    weight of AuxK, by which latents without activity in the last `dead_feature_threshold` vectors
    learn to predict what the others leave over. normalize_decoder: rows of W_dec keep unit norm.
    multi_topk: 4 k latents are to reconstruct as well, with an eighth of the weight. matryoshka:
    numbers of latents; the first so many are to reconstruct as well, all with the same weight.
    dtype: of the product that latents are chosen from. group: a `distributed.Group` that splits
    each update's vectors; it sums over the processes. graph: calls replay a CUDA graph instead of
    launching kernels one by one; not yet tried on a GPU.

    `state` holds all tensors that updates change, by name: the SAE's own, Adam's moments and step,
    `silent_for` (vectors since each latent was last active), `dead` (which were when last listed),
    `residual` (mean |x - x_hat|^2 of the last update). Raises ValueError for variants that do not
    go together.
    """

    def __init__(
        self,
        sae,
        variance: float,
        auxk_alpha: float = 1 / 32,
        dead_feature_threshold: int = 100_000,
        normalize_decoder: bool = True,
        multi_topk: bool = False,
        matryoshka: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        group=None,
        graph: bool = False,
    ):
        if multi_topk and (matryoshka or sae.takes_samples or sae.takes_batches):
            raise ValueError(
                "multi_topk goes with plain top-k alone, not with matryoshka, batch_topk or sample_topk"
            )
        for m in matryoshka:
            if not 1 <= m <= sae.num_latents:
                raise ValueError(f"matryoshka {m}: expected 1 to num_latents = {sae.num_latents}")

        self.sae = sae
        self.variance = variance
        self.auxk_alpha = auxk_alpha
        self.dead_feature_threshold = dead_feature_threshold
        self.normalize_decoder = normalize_decoder
        self.multi_topk = multi_topk
        self.prefixes = sorted({*matryoshka, sae.num_latents})
        self.group = group if group is not None and group.count > 1 else None

        self.params = {name: p.data for name, p in sae.named_parameters()}
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            self.params[name] for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
        )
        M, device = len(self.W_dec), self.W_dec.device
        self.state = {
            "silent_for": torch.zeros(M, dtype=torch.int64, device=device),
            "dead": torch.zeros(M, dtype=torch.bool, device=device),
            "residual": torch.ones((), device=device),
            "step": torch.zeros((), device=device),
            **self.params,
            **dict(sae.named_buffers()),
        }
        for name, p in self.params.items():
            self.state[f"{name}.exp_avg"] = torch.zeros_like(p)
            self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(p)

        self.padded = (
            device.type == "cuda"
        )  # the list of dead latents has one of a few lengths, for CUDA graphs
        self.dead = torch.zeros(0, dtype=torch.int64, device=device)
        self.num_listed = 0
        self.select = Selector()
        kept = self.group is not None or device.type == "cpu" and self.W_enc.numel() <= KEPT
        self.memory = [
            torch.empty_like(self.W_enc) if kept else None for _ in range(2)
        ]  # for the matrices' gradients
        self.copy = (
            None if dtype in (None, self.W_enc.dtype) else self.W_enc.to(dtype)
        )  # what the product multiplies by

        self.graphs = {} if graph else None
        self.calls = 0
        self.lr = torch.zeros((), device=device)

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over a saved `state`; of several processes the first one has to give it."""
        for name, tensor in self.state.items():
            if self.group is None or self.group.index == 0:
                tensor.copy_(tensors[name])
            if self.group is not None:
                self.group.broadcast(
                    tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
                )
        self.calls = int(self.state["step"])
        self.index_dead()
        if self.copy is not None:
            self.copy.copy_(self.W_enc)

    def num_dead(self) -> int:
        """Latents without activity in the last `dead_feature_threshold` vectors. Waits for the
        device."""
        return int((self.state["silent_for"] >= self.dead_feature_threshold).sum())

    def list_dead(self) -> None:
        """Choose the latents that AuxK brings back, until the next call: those that are dead now.
        Waits for the device."""
        if not self.auxk_alpha:
            return
        torch.ge(self.state["silent_for"], self.dead_feature_threshold, out=self.state["dead"])
        self.index_dead()

    def index_dead(self) -> None:
        """`dead`: indices of the listed latents, rising; `padded` to a power of two with the number
        past the last."""
        self.dead = self.state["dead"].nonzero().flatten()
        self.num_listed = len(self.dead)
        if self.padded and len(self.dead):
            full = self.dead.new_full((1 << (len(self.dead) - 1).bit_length(),), len(self.W_dec))
            full[: len(self.dead)] = self.dead
            self.dead = full

    def __call__(
        self,
        x: torch.Tensor,
        lr: float,
        num_vectors: int | None = None,
        plain_topk: bool = False,
        weights: torch.Tensor | None = None,
        parts: int = 1,
    ) -> tuple[Forward, torch.Tensor]:
        """One whole update: `list_dead` in every LIST_DEAD_EVERY-th, forward, backward, step.
        Returns Forward and the norm."""
        if self.calls % LIST_DEAD_EVERY == 0:
            self.list_dead()
        self.calls += 1
        self.lr.fill_(lr)
        if self.graphs is not None and x.is_cuda:
            return self.replay(x, num_vectors, plain_topk, weights, parts)
        return self.run(x, num_vectors, plain_topk, weights, parts)

    def run(
        self, x, num_vectors=None, plain_topk=False, weights=None, parts=1
    ) -> tuple[Forward, torch.Tensor]:
        """All that an update does on the device, with the same shapes each time: what a CUDA graph
        captures."""
        forward = self.forward(x, num_vectors, plain_topk, weights, parts)
        return forward, self.step(self.backward(forward), self.lr)

    def replay(self, x, num_vectors, plain_topk, weights, parts) -> tuple[Forward, torch.Tensor]:
        """`run` from a CUDA graph, one for each shape of its inputs; the next call overwrites what
        it returns."""
        memory = self.select.pre_acts.data_ptr()  # a larger batch makes it anew
        key = (x.shape, weights is not None, parts, plain_topk, num_vectors, len(self.dead), memory)
        if key not in self.graphs:  # the first time as it is, which compiles the kernels
            self.graphs[key] = None
            return self.run(x, num_vectors, plain_topk, weights, parts)
        if self.graphs[key] is None:
            inputs = (x.clone(), None if weights is None else weights.clone(), self.dead.clone())
            graph = torch.cuda.CUDAGraph()
            current, self.dead = self.dead, inputs[2]
            with torch.cuda.graph(graph):  # runs nothing yet
                results = self.run(inputs[0], num_vectors, plain_topk, inputs[1], parts)
            self.dead = current
            self.graphs[key] = graph, inputs, results
        graph, inputs, results = self.graphs[key]
        for mine, given in zip(inputs, (x, weights, self.dead)):
            if mine is not None:
                mine.copy_(given)
        graph.replay()
        return results

    @torch.no_grad()
    def forward(
        self,
        x: torch.Tensor,
        num_vectors: int | None = None,
        plain_topk: bool = False,
        weights: torch.Tensor | None = None,
        parts: int = 1,
    ) -> Forward:
        """The loss, and what its gradients need. Changes nothing.

        x (n, d), or whole samples (samples, tokens, d) where `sae.takes_samples`. num_vectors: the
        update's, of which x is this process's part (None: x is all). plain_topk: every vector gets
        equally many latents, as in the beginning of a training. weights (n,): of each vector's
        error in the loss (None: 1). parts: the product is made in so many, to save memory.
        """
        given = x.flatten(0, -2)
        x, _, std = self.sae.standardize(x)
        tokens = x.shape[-2]
        x = x.flatten(0, -2)
        num_vectors = num_vectors or len(x)
        centred = x - self.b_dec

        choices, least = self.choose(centred, tokens, num_vectors, plain_topk, parts)
        reconstructions = [self.reconstruct(x, *choice) for choice in choices]
        _, top_acts, top_indices = choices[-1]
        last = reconstructions[-1]

        slope = torch.full((len(x), 1), 2 / (num_vectors * self.variance), device=x.device)
        if weights is not None:
            slope = slope * weights[:, None]
        squares = [
            torch.linalg.vector_norm(r.e, dim=1).square() @ slope[:, 0] / 2 for r in reconstructions
        ]
        loss = sum(r.share * square for r, square in zip(reconstructions, squares))
        auxk = None
        if self.num_listed:
            auxk = self.auxk(centred, last.e, slope * (self.variance / 2))
            loss = loss + auxk.loss

        active = count_active(last.top_acts, last.top_indices, len(self.W_dec)) > 0
        loss, square, active = self.sum_over_processes(loss, squares[-1], active.to(x.dtype))
        e = last.e if std is None else last.e * std.flatten()[:, None]
        return Forward(
            loss,
            given,
            e,
            top_acts,
            top_indices,
            num_vectors,
            centred,
            slope,
            reconstructions,
            auxk,
            least,
            active,
            square,
        )

    def choose(self, centred, tokens, num_vectors, plain_topk, parts):
        """The active latents: [(share of the loss, top_acts (n, K), top_indices (n, K)) of each
        reconstruction], `least`."""
        k = self.sae.k
        width = min(4 * k, self.sae.num_latents) if self.multi_topk else self.sae.width(tokens)
        acts, indices = self.largest(centred, width, parts)
        acts = acts.to(centred.dtype)
        if self.multi_topk:
            top_acts, places = topk(acts, k)
            return [(1 / 8, acts, indices), (1, top_acts, indices.gather(1, places))], None

        acts, least = self.keep(acts, tokens, num_vectors, plain_topk)
        share, M = 1 / len(self.prefixes), self.sae.num_latents
        return [
            (share, acts * (indices < m) if m < M else acts, indices) for m in self.prefixes
        ], least

    def largest(self, centred, width, parts):
        """The largest pre_acts of each vector, `width` of them, and their latents."""
        W = self.W_enc if self.copy is None else self.copy
        b = self.b_enc.to(W.dtype)
        found = [self.select(part, W, b, width) for part in centred.to(W.dtype).chunk(parts)]
        return found[0] if parts == 1 else tuple(torch.cat(pieces) for pieces in zip(*found))

    def keep(self, acts, tokens, num_vectors, plain_topk):
        """The SAE's choice among the largest (n, K), where it is one for a whole batch among those
        of all processes."""
        if self.group is None or not self.sae.takes_batches:
            return self.sae.keep(acts, tokens, plain_topk)
        whole, here = acts.new_zeros(num_vectors, acts.shape[1]), self.group.slice_of(num_vectors)
        whole[here] = acts
        kept, least = self.sae.keep(self.group.sum(whole), tokens, plain_topk)
        return kept[here], least

    def reconstruct(self, x, share, top_acts, top_indices) -> Reconstruction:
        """x (n, d) from the latents that were chosen."""
        return Reconstruction(
            share,
            top_acts,
            top_indices,
            *decode_error(x, top_acts, top_indices, self.W_dec, self.b_dec),
        )

    def auxk(self, centred, e, weight) -> AuxK:
        """How badly the dead latents predict what the others leave over.

            e_hat = the k_aux largest activations among the dead latents, times their rows of W_dec
            AuxK  = sum of auxk_alpha weight |-e - e_hat|^2 / residual;   k_aux = d / 2

        centred (n, d); e = x_hat - x (n, d), a constant; weight (n, 1), 1 / n if the vectors are
        alike. Divided by the residual, AuxK is 1 where the dead latents predict nothing, as in
        openai/sparse_autoencoder; with the variance, as in sparsify, 25 % of 256 badly started
        latents stayed dead, not 1 %. sparsify's factor min(C / k_aux, 1) would do nothing: a dead
        latent has no other gradient, and Adam rescales it. The products are dense, but over the
        dead latents alone: at k_aux = d / 2 gathering rows would cost more.
        """
        rows = self.rows_of(self.dead)
        acts = torch.addmm(self.b_enc[rows], centred, self.W_enc[rows].T).relu_()  # (n, C)
        if self.padded:
            acts *= self.dead < len(self.W_dec)
        k_aux = max(1, centred.shape[1] // 2)
        least = self.least_of_largest_dead(acts, k_aux)
        if least is not None:
            acts *= acts >= least
        left = self.add_reconstruction(e, acts, self.W_dec[rows])
        scale = self.auxk_alpha * weight / self.state["residual"]
        return AuxK((left.square() * scale).sum(), self.dead, acts, left, scale)

    def rows_of(self, dead):
        """Rows of the matrices for the listed latents; where there is no latent, the last row."""
        return dead.clamp(max=len(self.W_dec) - 1)

    def least_of_largest_dead(self, acts, k):
        """The k-th largest of each row of acts (n, C): (n, 1); None if all of them stay."""
        return topk(acts, k)[0].amin(1, keepdim=True) if acts.shape[1] > k else None

    def add_reconstruction(self, e, acts, W_dec):
        """e + acts W_dec"""
        return torch.addmm(e, acts, W_dec)

    @torch.no_grad()
    def backward(self, forward: Forward) -> Gradients:
        """The gradients of all parameters, summed over all processes, before clipping."""
        reconstructions, slope, M = forward.reconstructions, forward.slope, len(self.W_dec)
        n, width = len(forward.x), max(r.top_acts.shape[1] for r in reconstructions)

        # pairs (vector, place) sorted by latent; those that are not active come last, and count
        # nowhere
        order, ends = sort_pairs(
            stack(
                [torch.where(r.top_acts > 0, r.top_indices, M) for r in reconstructions], width, M
            ),
            M,
        )
        scaled = stack([r.top_acts * (r.share * slope) for r in reconstructions], width).flatten()[
            order
        ]
        d_acts = stack([r.d_acts * (r.share * slope) for r in reconstructions], width).flatten()[
            order
        ]
        along = stack([r.top_acts for r in reconstructions], width).flatten()[order] * d_acts
        rows = order // width  # of the reconstructions' errors, one below the other
        vectors = rows % n if len(reconstructions) > 1 else rows
        errors = stack([r.e for r in reconstructions], forward.x.shape[1])

        W_enc = Gradient(d_acts, vectors, ends, forward.centred)
        W_dec = Gradient(scaled, rows, ends, errors)
        b_enc, along = totals(d_acts, ends), totals(along, ends)
        b_dec = sum((r.share * slope[:, 0]) @ r.e for r in reconstructions)
        if forward.auxk is not None:
            _, dead, acts, left, scale = forward.auxk
            latents = self.rows_of(dead)
            g = left * (2 * scale)
            d_acts = (g @ self.W_dec[latents].T) * (acts > 0)
            b_enc = b_enc.index_add(0, latents, d_acts.sum(0))
            along = along.index_add(0, latents, (acts * d_acts).sum(0))
            W_enc = W_enc._replace(rows=dead, dense=d_acts.T @ forward.centred)
            W_dec = W_dec._replace(rows=dead, dense=acts.T @ g)

        W_enc, W_dec = (
            sum_over(self.group, matrix, memory)
            for matrix, memory in zip((W_enc, W_dec), self.memory)
        )
        b_enc, along, b_dec = self.sum_over_processes(b_enc, along, b_dec)
        b_dec = b_dec - self.times_W_enc(b_enc)
        return Gradients(
            forward, W_enc, b_enc, W_dec, b_dec, along if self.normalize_decoder else None
        )

    def sum_over_processes(self, *tensors):
        """The sums of several small tensors of one dtype, in one message."""
        return tensors if self.group is None else self.group.sum_all(*tensors)

    def times_W_enc(self, b_enc):
        """b_enc W_enc: (M,) -> (d,)"""
        return weighted_sum(b_enc, self.W_enc)

    def squared_norm(self, gradients):
        """(): of all gradients but b_dec's, without what unit norm takes out"""
        matrices = squared_norm(gradients.W_enc) + squared_norm(gradients.W_dec, gradients.along)
        return matrices + gradients.b_enc.square().sum()

    @torch.no_grad()
    def step(self, gradients: Gradients, lr: float | torch.Tensor) -> torch.Tensor:
        """Clip the gradients to norm 1, and make one step of Adam. Returns the norm that they had,
        ()."""
        if lr is not self.lr:
            self.lr.fill_(lr)
        step = self.state["step"].add_(1)

        norm = (self.squared_norm(gradients) + gradients.b_dec.square().sum()).sqrt()
        clip = norm.clamp(min=1.0)
        moments = {
            name: (self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"])
            for name in self.params
        }
        update_rows(
            self.W_enc,
            gradients.W_enc,
            *moments["encoder.weight"],
            step,
            self.lr,
            clip,
            copy=self.copy,
        )
        update_rows(
            self.W_dec, gradients.W_dec, *moments["W_dec"], step, self.lr, clip, gradients.along
        )
        for name, gradient in (("encoder.bias", gradients.b_enc), ("b_dec", gradients.b_dec)):
            first, second = moments[name]
            adam([self.params[name]], [gradient / clip], [first], [second], step, self.lr)

        forward = gradients.forward
        if forward.least is not None:
            self.state["threshold"].lerp_(
                forward.least.to(self.b_dec.dtype), (1 / step).clamp(min=1 / WINDOW)
            )
        self.state["silent_for"].add_(forward.num_vectors).masked_fill_(forward.active > 0, 0)
        self.state["residual"].copy_(forward.square * self.variance).clamp_(
            min=1e-6 * self.variance
        )
        return norm


def stack(tensors, width, value=0.0):
    """Tensors (n, up to `width`), one below the other; the narrower ones are filled up with
    `value`."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(
        [F.pad(tensor, (0, width - tensor.shape[1]), value=value) for tensor in tensors]
    )
