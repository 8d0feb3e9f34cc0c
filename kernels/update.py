"""One training update of an SAE: forward, backward and the optimizer's step, without autograd.

    update = SparseUpdate(sae, variance)
    update.list_dead()                        # in every LIST_DEAD_EVERY-th update
    forward = update.forward(x)               # the loss, and what the gradients need
    gradients = update.backward(forward)      # d loss / d parameters, before clipping
    grad_norm = update.step(gradients, lr)    # only this call changes weights and state

`update(x, lr)` does all of this. There are n vectors x of width d and M latents.

Forward. K latents of each vector are active; a vector with fewer has zeros among its top_acts.

    centred  = x - b_dec                                                         (n, d)
    pre_acts = relu(centred W_enc^T + b_enc)                                     (n, M)
    top_acts, top_indices = the K pre_acts that the SAE selects                  (n, K)
    x_hat    = sum over j of top_acts[:, j] W_dec[top_indices[:, j]] + b_dec     (n, d)
    e        = x_hat - x                                                         (n, d)
    loss     = sum |e|^2 / (n variance)  +  auxk_alpha AuxK                      ()

Backward. The gradient of the loss with respect to x_hat is slope e, with slope = 2 / (n variance).
A pair is an active latent of a vector: (i, j) with top_acts[i, j] > 0. The sums for latent m are
over its pairs, those with top_indices[i, j] = m.

    d_acts[i, j] = slope e[i] . W_dec[top_indices[i, j]]                         (n, K)
    dW_dec[m]    = sum of slope top_acts[i, j] e[i]                              (M, d)
    dW_enc[m]    = sum of d_acts[i, j] centred[i]                                (M, d)
    db_enc[m]    = sum of d_acts[i, j]                                           (M,)
    db_dec       = sum over i of slope e[i]  -  db_enc W_enc                     (d,)

Step. The gradients are clipped to norm 1 together; Adam and unit norm are in kernels/adam.py.

The only thing of size (n, M) that is made is pre_acts, and that by blocks. A row of dW_enc or
dW_dec is the sum over a few pairs. This is so cheap that large gradients are made twice, block by
block: once for the norm that clips them, and once where Adam uses them. They never exist as a
whole. Nothing waits for the device except `list_dead`, `num_dead` and `load_state_dict`.

An SAE may compare several reconstructions of a vector with x (Multi-TopK, Matryoshka). Each adds
its error to the loss, and its pairs to the sums. The SAE, a `sae.Sae`, says what its variant does:
`standardize`, `width`, `keep`, `takes_samples`, `takes_batches`.

Sources: TopK, AuxK and Multi-TopK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4, A.2 and
A.3; BatchTopK, Bussmann et al. 2024 (arXiv 2412.06410); Matryoshka SAEs, Bussmann et al. 2025
(arXiv 2503.17547).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.adam import adam, squared_norm, sum_over, update_rows
from kernels.decode import decode_error
from kernels.encode import Selector
from kernels.grad import MAX_STORED, Gradient, count_active, sort_pairs, totals, weighted_sum
from kernels.topk import topk

LIST_DEAD_EVERY = 16  # updates; listing the dead latents waits for the device
THRESHOLD_WINDOW = 10  # updates over which the threshold of a batchtopk SAE is averaged
MULTI_TOPK_FACTOR = 4  # Multi-TopK also reconstructs with this many times k latents,
MULTI_TOPK_WEIGHT = 1 / 8  # and that reconstruction has this weight in the loss (Gao et al., A.3)
SMALLEST_RESIDUAL = 1e-6  # of the variance; AuxK is divided by the residual, which may become 0


class Choice(NamedTuple):
    """The active latents of one reconstruction."""

    loss_weight: float
    """The weight of the reconstruction's error in the loss."""

    top_acts: Tensor
    """(n, K); zeros are not active"""

    top_indices: Tensor
    """(n, K) int64: rows of W_dec"""


class Reconstruction(NamedTuple):
    """One x_hat that the loss compares with x. Multi-TopK and Matryoshka have several; the last
    one is the SAE's own reconstruction."""

    loss_weight: float
    """The weight of its error in the loss."""

    top_acts: Tensor
    """(n, K); zeros are not active"""

    top_indices: Tensor
    """(n, K) int64: rows of W_dec"""

    e: Tensor
    """(n, d): x_hat - x"""

    d_acts: Tensor
    """(n, K): e . W_dec[top_indices] where top_acts > 0, else 0. It is not yet times the slope."""


class AuxK(NamedTuple):
    """How well the listed dead latents predict the error of the others. C latents are listed."""

    loss: Tensor
    """(): auxk_alpha AuxK"""

    dead_indices: Tensor
    """(C,) int64, rising: the listed latents, padded with M"""

    acts: Tensor
    """(n, C): their activations, of which each vector keeps the k_aux largest"""

    left_over: Tensor
    """(n, d): e + e_hat, the error that remains after their prediction"""

    scale: Tensor
    """(n, 1): loss = sum of scale |left_over|^2"""


class Forward(NamedTuple):
    """The loss of a batch, before its update, and what the gradients need."""

    loss: Tensor
    """(): summed over the update's vectors, of all processes"""

    x: Tensor
    """(n, d): the vectors that were given"""

    e: Tensor
    """(n, d): x_hat - x, in the units of the given vectors"""

    top_acts: Tensor
    """(n, K); zeros are not active"""

    top_indices: Tensor
    """(n, K) int64"""

    num_vectors: int
    """The number of the update's vectors, of all processes"""

    centred: Tensor
    """(n, d): x - b_dec, after input_unit_norm"""

    slope: Tensor
    """(n, 1): d loss / d x_hat = slope e, for a reconstruction with loss_weight 1"""

    reconstructions: list[Reconstruction]
    """The last one is the SAE's own reconstruction."""

    auxk: AuxK | None
    """None while no latent is listed as dead"""

    batch_threshold: Tensor | None
    """(): the smallest activation that a batchtopk SAE kept; None for other variants"""

    active: Tensor
    """(M,) float: the number of processes in whose vectors each latent was active"""

    error_loss: Tensor
    """(): sum |x - x_hat|^2 / (n variance) of the SAE's own reconstruction, of all processes"""

    @property
    def x_hat(self) -> Tensor:
        """(n, d): the SAE's own reconstruction, in the units of the given vectors"""
        return self.x + self.e


class Gradients(NamedTuple):
    """The gradients of the four parameters."""

    forward: Forward
    """The batch that these are the gradients for."""

    W_enc: Gradient
    """(M, d), as sums over pairs"""

    b_enc: Tensor
    """(M,)"""

    W_dec: Gradient
    """(M, d), as sums over pairs"""

    b_dec: Tensor
    """(d,)"""

    along: Tensor | None
    """(M,): dW_dec[m] . W_dec[m], the part of a row's gradient that unit norm takes out; None
    without normalize_decoder"""


class CapturedUpdate(NamedTuple):
    """A CUDA graph of one update, and the memory that it reads and writes."""

    graph: Any
    """torch.cuda.CUDAGraph"""

    x: Tensor
    """Copy the next batch into this tensor before replaying."""

    weights: Tensor | None
    """The same for the weights of the vectors."""

    dead_indices: Tensor
    """The same for the listed dead latents."""

    results: tuple[Forward, Tensor]
    """What `run` returned: every replay overwrites it."""


class SparseUpdate:
    """Updates an SAE in place, one batch of vectors at a time.

    variance: the mean |x - mean|^2 of the vectors; the squared error is divided by it.
    auxk_alpha: the weight of AuxK; 0 turns it off.
    dead_feature_threshold: a latent is dead after this many vectors without an activation.
    normalize_decoder: keep unit norm in the rows of W_dec.
    multi_topk: 4 k latents must reconstruct as well, with an eighth of the weight.
    matryoshka: for each number m, the first m latents must reconstruct as well. All
        reconstructions have the same weight.
    dtype: the dtype of the product that latents are chosen from, if not that of W_enc.
    group: a `distributed.Group` that splits each update's vectors; gradients are summed over it.
    graph: replay a CUDA graph instead of launching kernels one by one. Not yet tried on a GPU.

    `state` holds all tensors that updates change, by name: the SAE's own, Adam's moments
    (`<parameter>.exp_avg`, `<parameter>.exp_avg_sq`) and `step`, `silent_for` (vectors since each
    latent was last active), `dead` (the latents that were dead when last listed) and `residual`
    (mean |x - x_hat|^2 of the last update).

    Raises ValueError for variants that do not go together.
    """

    def __init__(
        self,
        sae: nn.Module,
        variance: float,
        auxk_alpha: float = 1 / 32,
        dead_feature_threshold: int = 100_000,
        normalize_decoder: bool = True,
        multi_topk: bool = False,
        matryoshka: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        group: Any = None,
        graph: bool = False,
    ):
        check_variant(sae, multi_topk, matryoshka)

        self.sae = sae
        self.variance = variance
        self.auxk_alpha = auxk_alpha
        self.dead_feature_threshold = dead_feature_threshold
        self.normalize_decoder = normalize_decoder
        self.multi_topk = multi_topk
        self.prefixes = sorted({*matryoshka, sae.num_latents})
        self.group = None
        if group is not None and group.count > 1:
            self.group = group

        self.params = {name: parameter.data for name, parameter in sae.named_parameters()}
        self.W_enc = self.params["encoder.weight"]
        self.b_enc = self.params["encoder.bias"]
        self.W_dec = self.params["W_dec"]
        self.b_dec = self.params["b_dec"]
        self.state = self.initial_state()

        # the product is made in `dtype`, so Adam keeps a copy of W_enc in it up to date
        self.copy = None
        if dtype is not None and dtype != self.W_enc.dtype:
            self.copy = self.W_enc.to(dtype)
        self.select = Selector()
        self.gradient_memory = self.allocate_gradients()

        device = self.W_enc.device
        self.dead_indices = torch.zeros(0, dtype=torch.int64, device=device)
        self.num_listed = 0  # dead latents, without padding; of all processes that split latents
        # a CUDA graph needs the same shapes each time, so dead_indices has one of a few lengths
        self.padded = device.type == "cuda"

        self.graphs = {} if graph else None
        self.calls = 0
        self.lr = torch.zeros((), device=device)

    def initial_state(self) -> dict[str, Tensor]:
        """Return the tensors that updates change, as they are before the first update."""
        num_latents, device = len(self.W_dec), self.W_dec.device
        state = {
            "silent_for": torch.zeros(num_latents, dtype=torch.int64, device=device),
            "dead": torch.zeros(num_latents, dtype=torch.bool, device=device),
            "residual": torch.ones((), device=device),
            "step": torch.zeros((), device=device),
        }
        state.update(self.params)
        state.update(self.sae.named_buffers())
        for name, parameter in self.params.items():
            state[f"{name}.exp_avg"] = torch.zeros_like(parameter)
            state[f"{name}.exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def allocate_gradients(self) -> list[Tensor | None]:
        """Return memory for dW_enc and dW_dec where they are stored; None where they are made
        twice, block by block.

        Several processes must store them, to sum them. A CPU stores them if they are small.
        """
        is_small = self.W_enc.device.type == "cpu" and self.W_enc.numel() <= MAX_STORED
        if self.group is None and not is_small:
            return [None, None]
        return [torch.empty_like(self.W_enc), torch.empty_like(self.W_dec)]

    def __call__(
        self,
        x: Tensor,
        lr: float,
        num_vectors: int | None = None,
        plain_topk: bool = False,
        weights: Tensor | None = None,
        num_chunks: int = 1,
    ) -> tuple[Forward, Tensor]:
        """Make one whole update, and return its Forward and the gradients' norm () before clipping.

        The dead latents are listed in every LIST_DEAD_EVERY-th call. For the arguments see
        `forward`.
        """
        if self.calls % LIST_DEAD_EVERY == 0:
            self.list_dead()
        self.calls += 1
        self.lr.fill_(lr)
        if self.graphs is not None and x.is_cuda:
            return self.replay(x, num_vectors, plain_topk, weights, num_chunks)
        return self.run(x, num_vectors, plain_topk, weights, num_chunks)

    def run(
        self,
        x: Tensor,
        num_vectors: int | None = None,
        plain_topk: bool = False,
        weights: Tensor | None = None,
        num_chunks: int = 1,
    ) -> tuple[Forward, Tensor]:
        """Do all that an update does on the device; the learning rate is read from `self.lr`.

        Shapes are the same each time, so a CUDA graph can capture it.
        """
        forward = self.forward(x, num_vectors, plain_topk, weights, num_chunks)
        gradients = self.backward(forward)
        grad_norm = self.step(gradients, self.lr)
        return forward, grad_norm

    # ---- forward ----

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        num_vectors: int | None = None,
        plain_topk: bool = False,
        weights: Tensor | None = None,
        num_chunks: int = 1,
    ) -> Forward:
        """Compute the loss, and what its gradients need. Changes no state.

        x: (n, d), or whole samples (samples, tokens, d) where `sae.takes_samples`.
        num_vectors: the number of the update's vectors, of all processes. If not given, x holds all
            of them.
        plain_topk: give every vector equally many latents, as at the beginning of a training.
        weights: (n,), the weight of each vector's error in the loss. If not given, 1.
        num_chunks: make the product in this many chunks of vectors, to save memory.
        """
        tokens = x.shape[-2]
        vectors = x.flatten(0, -2)
        standardized, _, std = self.sae.standardize(x)
        standardized = standardized.flatten(0, -2)
        if num_vectors is None:
            num_vectors = len(vectors)
        centred = standardized - self.b_dec

        choices, batch_threshold = self.choose(centred, tokens, num_vectors, plain_topk, num_chunks)
        reconstructions = [self.reconstruct(standardized, *choice) for choice in choices]
        last = reconstructions[-1]

        slope = self.slope_of(len(vectors), num_vectors, weights)
        loss = 0.0
        errors = []
        for reconstruction in reconstructions:
            errors.append(error_loss(reconstruction.e, slope))
            loss = loss + reconstruction.loss_weight * errors[-1]

        auxk = None
        if self.num_listed:
            vector_weight = slope * (self.variance / 2)  # 1 / num_vectors, times each weight
            auxk = self.auxk(centred, last.e, vector_weight)
            loss = loss + auxk.loss

        is_active = count_active(last.top_acts, last.top_indices, len(self.W_dec)) > 0
        loss, last_error, active = self.sum_over_processes(
            loss, errors[-1], is_active.to(standardized.dtype)
        )
        return Forward(
            loss=loss,
            x=vectors,
            e=last.e if std is None else last.e * std.flatten()[:, None],
            top_acts=choices[-1].top_acts,
            top_indices=choices[-1].top_indices,
            num_vectors=num_vectors,
            centred=centred,
            slope=slope,
            reconstructions=reconstructions,
            auxk=auxk,
            batch_threshold=batch_threshold,
            active=active,
            error_loss=last_error,
        )

    def slope_of(self, n: int, num_vectors: int, weights: Tensor | None) -> Tensor:
        """Return 2 / (num_vectors variance), times each vector's weight: (n, 1)."""
        slope = torch.full((n, 1), 2 / (num_vectors * self.variance), device=self.b_dec.device)
        if weights is None:
            return slope
        return slope * weights[:, None]

    def choose(
        self, centred: Tensor, tokens: int, num_vectors: int, plain_topk: bool, num_chunks: int
    ) -> tuple[list[Choice], Tensor | None]:
        """Return the active latents of each reconstruction, with the SAE's own reconstruction last,
        and the batch's threshold.

        The threshold is the smallest activation that a batchtopk SAE kept, (); None for other
        variants.
        """
        if self.multi_topk:
            return self.choose_multi_topk(centred, num_chunks), None

        acts, indices = self.largest(centred, self.sae.width(tokens), num_chunks)
        acts = acts.to(centred.dtype)
        acts, batch_threshold = self.keep(acts, tokens, num_vectors, plain_topk)

        choices = []
        for m in self.prefixes:
            prefix_acts = acts
            if m < self.sae.num_latents:
                prefix_acts = acts * (indices < m)
            choices.append(Choice(1 / len(self.prefixes), prefix_acts, indices))
        return choices, batch_threshold

    def choose_multi_topk(self, centred: Tensor, num_chunks: int) -> list[Choice]:
        """Return two choices: the 4 k largest activations of each vector, and the k largest among
        them."""
        k = self.sae.k
        width = min(MULTI_TOPK_FACTOR * k, self.sae.num_latents)
        acts, indices = self.largest(centred, width, num_chunks)
        acts = acts.to(centred.dtype)
        top_acts, columns = topk(acts, k)
        return [
            Choice(MULTI_TOPK_WEIGHT, acts, indices),
            Choice(1.0, top_acts, indices.gather(1, columns)),
        ]

    def largest(self, centred: Tensor, width: int, num_chunks: int) -> tuple[Tensor, Tensor]:
        """Return the `width` largest pre_acts of each vector and their latents, (n, width) each."""
        W = self.W_enc if self.copy is None else self.copy
        b = self.b_enc.to(W.dtype)
        chunks = []
        for chunk in centred.to(W.dtype).chunk(num_chunks):
            chunks.append(self.select(chunk, W, b, width))
        if num_chunks == 1:
            return chunks[0]
        acts = torch.cat([acts for acts, _ in chunks])
        indices = torch.cat([indices for _, indices in chunks])
        return acts, indices

    def keep(
        self, acts: Tensor, tokens: int, num_vectors: int, plain_topk: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return acts (n, K), each vector's largest pre_acts, with 0 where the SAE does not keep
        one, and the batch's threshold (see `choose`).

        A batchtopk SAE chooses among the vectors of all processes, so every process gets all
        activations, makes the same choice, and returns its own vectors' rows of it.
        """
        if self.group is None or not self.sae.takes_batches:
            return self.sae.keep(acts, tokens, plain_topk)
        local_rows = self.group.slice_of(num_vectors)
        all_acts = acts.new_zeros(num_vectors, acts.shape[1])
        all_acts[local_rows] = acts
        kept, batch_threshold = self.sae.keep(self.group.sum(all_acts), tokens, plain_topk)
        return kept[local_rows], batch_threshold

    def reconstruct(
        self, x: Tensor, loss_weight: float, top_acts: Tensor, top_indices: Tensor
    ) -> Reconstruction:
        """Return x_hat - x for the latents that were chosen, and what else `Reconstruction` holds.

        x (n, d): after input_unit_norm. top_acts, top_indices (n, K): a `Choice`.
        """
        e, d_acts = decode_error(x, top_acts, top_indices, self.W_dec, self.b_dec)
        return Reconstruction(loss_weight, top_acts, top_indices, e, d_acts)

    def auxk(self, centred: Tensor, e: Tensor, weight: Tensor) -> AuxK:
        """Return how badly the listed dead latents predict the error of the others.

            e_hat = the k_aux largest activations among the dead latents, times their rows of W_dec
            AuxK  = sum of weight |-e - e_hat|^2 / residual,   k_aux = d / 2

        centred (n, d). e (n, d) is x_hat - x and counts as a constant. weight (n, 1) is 1 / n if
        all vectors have the weight 1.

        AuxK is divided by the residual, so it is 1 where the dead latents predict nothing, as in
        openai/sparse_autoencoder. Divided by the variance, as in sparsify, 25 % of 256 badly
        started latents stayed dead instead of 1 %. sparsify's factor min(C / k_aux, 1) would change
        nothing: a dead latent has no other gradient, and Adam rescales it. The products are dense,
        but over the dead latents alone: at k_aux = d / 2 gathering rows would cost more.
        """
        rows = self.rows_of(self.dead_indices)
        acts = torch.addmm(self.b_enc[rows], centred, self.W_enc[rows].T).relu_()  # (n, C)
        if self.padded:
            acts *= self.dead_indices < len(self.W_dec)
        k_aux = max(1, centred.shape[1] // 2)
        smallest_kept = self.least_of_largest_dead(acts, k_aux)
        if smallest_kept is not None:
            acts *= acts >= smallest_kept
        left_over = self.add_reconstruction(e, acts, self.W_dec[rows])
        scale = self.auxk_alpha * weight / self.state["residual"]
        loss = (left_over.square() * scale).sum()
        return AuxK(loss, self.dead_indices, acts, left_over, scale)

    def rows_of(self, dead_indices: Tensor) -> Tensor:
        """Return the rows of the matrices for the listed latents; padding gets the last row."""
        return dead_indices.clamp(max=len(self.W_dec) - 1)

    def least_of_largest_dead(self, acts: Tensor, k: int) -> Tensor | None:
        """Return the k-th largest number of each row of acts (n, C): (n, 1). None if C <= k."""
        if acts.shape[1] <= k:
            return None
        return topk(acts, k)[0].amin(1, keepdim=True)

    def add_reconstruction(self, e: Tensor, acts: Tensor, W_dec: Tensor) -> Tensor:
        """Return e + acts W_dec: (n, d), (n, C), (C, d) -> (n, d)."""
        return torch.addmm(e, acts, W_dec)

    # ---- backward ----

    @torch.no_grad()
    def backward(self, forward: Forward) -> Gradients:
        """Return the gradients of all parameters, summed over all processes, before clipping.

        Changes no state; the memory of earlier gradients is used again.
        """
        local = self.reconstruction_gradients(forward)
        if forward.auxk is not None:
            local = self.add_auxk_gradients(local, forward.auxk)

        W_enc = sum_over(self.group, local.W_enc, self.gradient_memory[0])
        W_dec = sum_over(self.group, local.W_dec, self.gradient_memory[1])
        b_enc, along, b_dec = self.sum_over_processes(local.b_enc, local.along, local.b_dec)
        b_dec = b_dec - self.times_W_enc(b_enc)  # the encoder takes x - b_dec
        if not self.normalize_decoder:
            along = None
        return Gradients(forward, W_enc, b_enc, W_dec, b_dec, along)

    def reconstruction_gradients(self, forward: Forward) -> Gradients:
        """Return the gradients of the reconstructions' errors, for this process's vectors.

        The encoder's part of db_dec is missing: `backward` adds it once db_enc is complete.

        The tensors (n, K) of R reconstructions are stacked to (R n, K). So pair number p, counted
        row by row, belongs to row p // K of the stacked errors, and to vector (p // K) % n.
        """
        reconstructions, slope = forward.reconstructions, forward.slope
        n, d = forward.x.shape
        num_latents = len(self.W_dec)
        width = max(reconstruction.top_acts.shape[1] for reconstruction in reconstructions)

        latents, acts, scaled_acts, d_acts, errors = [], [], [], [], []
        b_dec = 0.0
        for reconstruction in reconstructions:
            is_active = reconstruction.top_acts > 0
            scale = reconstruction.loss_weight * slope  # (n, 1): d loss / d x_hat = scale e
            latents.append(torch.where(is_active, reconstruction.top_indices, num_latents))
            acts.append(reconstruction.top_acts)
            scaled_acts.append(reconstruction.top_acts * scale)
            d_acts.append(reconstruction.d_acts * scale)
            errors.append(reconstruction.e)
            b_dec = b_dec + scale[:, 0] @ reconstruction.e

        # sort the pairs by latent; those that are not active come last, and count nowhere
        order, ends = sort_pairs(stack(latents, width, num_latents), num_latents)
        acts = stack(acts, width).flatten()[order]
        scaled_acts = stack(scaled_acts, width).flatten()[order]
        d_acts = stack(d_acts, width).flatten()[order]
        errors = stack(errors, d)
        rows = order // width
        vectors = rows % n if len(reconstructions) > 1 else rows
        return Gradients(
            forward=forward,
            W_enc=Gradient(d_acts, vectors, ends, forward.centred),
            b_enc=totals(d_acts, ends),
            W_dec=Gradient(scaled_acts, rows, ends, errors),
            b_dec=b_dec,
            along=totals(acts * d_acts, ends),
        )

    def add_auxk_gradients(self, gradients: Gradients, auxk: AuxK) -> Gradients:
        """Return `gradients` plus AuxK's, which are dense, but only in the listed latents' rows.

        The error e counts as a constant, so b_dec gets a gradient only through `centred`.
        """
        rows = self.rows_of(auxk.dead_indices)
        d_e_hat = auxk.left_over * (2 * auxk.scale)  # (n, d)
        d_acts = (d_e_hat @ self.W_dec[rows].T) * (auxk.acts > 0)  # (n, C)
        dW_enc = d_acts.T @ gradients.forward.centred  # (C, d)
        dW_dec = auxk.acts.T @ d_e_hat
        return gradients._replace(
            W_enc=gradients.W_enc._replace(rows=auxk.dead_indices, dense=dW_enc),
            b_enc=gradients.b_enc.index_add(0, rows, d_acts.sum(0)),
            W_dec=gradients.W_dec._replace(rows=auxk.dead_indices, dense=dW_dec),
            along=gradients.along.index_add(0, rows, (auxk.acts * d_acts).sum(0)),
        )

    def sum_over_processes(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the sum over all processes of each tensor. They are small, have one dtype, and
        travel in one message."""
        if self.group is None:
            return tensors
        return self.group.sum_all(*tensors)

    def times_W_enc(self, b_enc: Tensor) -> Tensor:
        """Return b_enc W_enc: (M,) -> (d,)."""
        return weighted_sum(b_enc, self.W_enc)

    # ---- step ----

    @torch.no_grad()
    def step(self, gradients: Gradients, lr: float | Tensor) -> Tensor:
        """Clip the gradients to norm 1 and make one step of Adam, in place.

        Returns the norm that the gradients had before, (). It is NaN or infinite if a gradient is.
        """
        if lr is not self.lr:
            self.lr.fill_(lr)
        step = self.state["step"].add_(1)
        norm = (self.squared_norm(gradients) + gradients.b_dec.square().sum()).sqrt()
        clip = norm.clamp(min=1.0)

        moments = self.moments("encoder.weight")
        update_rows(self.W_enc, gradients.W_enc, *moments, step, self.lr, clip, copy=self.copy)
        moments = self.moments("W_dec")
        update_rows(self.W_dec, gradients.W_dec, *moments, step, self.lr, clip, gradients.along)
        for name, gradient in (("encoder.bias", gradients.b_enc), ("b_dec", gradients.b_dec)):
            first, second = self.moments(name)
            adam([self.params[name]], [gradient / clip], [first], [second], step, self.lr)

        self.update_statistics(gradients.forward)
        return norm

    def squared_norm(self, gradients: Gradients) -> Tensor:
        """Return |gradients|^2, (), over all but b_dec and without what unit norm takes out."""
        matrices = squared_norm(gradients.W_enc) + squared_norm(gradients.W_dec, gradients.along)
        return matrices + gradients.b_enc.square().sum()

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Return Adam's two moments of a parameter."""
        return self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"]

    def update_statistics(self, forward: Forward) -> None:
        """Bring up to date what the update knows of its data: threshold, silent_for, residual.

        The threshold is the mean of the first ten batches' thresholds, and then follows the later
        ones by a tenth of the difference each.
        """
        if forward.batch_threshold is not None:
            fraction = (1 / self.state["step"]).clamp(min=1 / THRESHOLD_WINDOW)
            self.state["threshold"].lerp_(forward.batch_threshold.to(self.b_dec.dtype), fraction)
        self.state["silent_for"].add_(forward.num_vectors).masked_fill_(forward.active > 0, 0)
        self.state["residual"].copy_(forward.error_loss * self.variance)
        self.state["residual"].clamp_(min=SMALLEST_RESIDUAL * self.variance)

    # ---- dead latents ----

    def num_dead(self) -> int:
        """Return how many latents had no activity in the last `dead_feature_threshold` vectors.
        Waits for the device."""
        return int((self.state["silent_for"] >= self.dead_feature_threshold).sum())

    def list_dead(self) -> None:
        """List the latents that are dead now; AuxK brings these back, until the next call. Waits
        for the device."""
        if not self.auxk_alpha:
            return
        torch.ge(self.state["silent_for"], self.dead_feature_threshold, out=self.state["dead"])
        self.make_dead_indices()

    def make_dead_indices(self) -> None:
        """List the dead latents of the mask `state["dead"]` in `dead_indices`, and count them in
        `num_listed`.

        If `padded`, the list is filled up with M, which is no latent, to a power of two, so that a
        CUDA graph sees few lengths: for M = 96 and the dead latents 1, 5 and 7 it is 1, 5, 7, 96,
        and `num_listed` is 3.
        """
        listed = self.state["dead"].nonzero().flatten()
        self.num_listed = len(listed)
        self.dead_indices = listed
        if self.padded and len(listed):
            length = 1 << (len(listed) - 1).bit_length()
            self.dead_indices = listed.new_full((length,), len(self.W_dec))
            self.dead_indices[: len(listed)] = listed

    # ---- state ----

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved `state`. Of several processes only the first one has to give it."""
        for name, tensor in self.state.items():
            if self.group is None or self.group.index == 0:
                tensor.copy_(tensors[name])
            if self.group is not None:
                is_mask = tensor.dtype == torch.bool  # which not every backend can send
                self.group.broadcast(tensor.view(torch.uint8) if is_mask else tensor)
        self.calls = int(self.state["step"])
        self.make_dead_indices()
        if self.copy is not None:
            self.copy.copy_(self.W_enc)

    # ---- CUDA graphs ----

    def replay(
        self,
        x: Tensor,
        num_vectors: int | None,
        plain_topk: bool,
        weights: Tensor | None,
        num_chunks: int,
    ) -> tuple[Forward, Tensor]:
        """Do what `run` does, by a CUDA graph, and return the same. The next call overwrites it.

        There is one graph for each combination of shapes. The first call with new shapes launches
        the kernels one by one, which compiles them; the second one captures the graph.
        """
        pre_acts = self.select.pre_acts.data_ptr()  # a larger batch allocates this memory anew
        shapes = (x.shape, weights is not None, len(self.dead_indices))
        key = (shapes, num_vectors, plain_topk, num_chunks, pre_acts)
        if key not in self.graphs:
            self.graphs[key] = None
            return self.run(x, num_vectors, plain_topk, weights, num_chunks)
        if self.graphs[key] is None:
            self.graphs[key] = self.capture(x, num_vectors, plain_topk, weights, num_chunks)

        captured = self.graphs[key]
        captured.x.copy_(x)
        if weights is not None:
            captured.weights.copy_(weights)
        captured.dead_indices.copy_(self.dead_indices)
        captured.graph.replay()
        return captured.results

    def capture(
        self,
        x: Tensor,
        num_vectors: int | None,
        plain_topk: bool,
        weights: Tensor | None,
        num_chunks: int,
    ) -> CapturedUpdate:
        """Return a CUDA graph of `run`, with copies of its inputs. This runs nothing yet."""
        x = x.clone()
        weights = None if weights is None else weights.clone()
        listed = self.dead_indices
        self.dead_indices = listed.clone()
        captured_indices = self.dead_indices

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.run(x, num_vectors, plain_topk, weights, num_chunks)
        self.dead_indices = listed
        return CapturedUpdate(graph, x, weights, captured_indices, results)


def check_variant(sae: nn.Module, multi_topk: bool, matryoshka: tuple[int, ...]) -> None:
    """Raise ValueError for variants that do not go together."""
    if multi_topk and (matryoshka or sae.takes_samples or sae.takes_batches):
        raise ValueError(
            "multi_topk goes with plain top-k alone, not with matryoshka, batch_topk or sample_topk"
        )
    for m in matryoshka:
        if not 1 <= m <= sae.num_latents:
            raise ValueError(f"matryoshka {m}: expected 1 to num_latents = {sae.num_latents}")


def error_loss(e: Tensor, slope: Tensor) -> Tensor:
    """Return the sum of slope |e|^2 / 2, that is sum |e|^2 / (n variance): (n, d), (n, 1) -> ()."""
    return torch.linalg.vector_norm(e, dim=1).square() @ slope[:, 0] / 2


def stack(tensors: list[Tensor], width: int, fill: float = 0.0) -> Tensor:
    """Return R tensors (n, up to `width`) one below the other: (R n, width).

    Narrower ones are filled up on the right: [[1, 2]] and [[3]] give [[1, 2], [3, fill]].
    """
    if len(tensors) == 1:
        return tensors[0]
    padded = []
    for tensor in tensors:
        padded.append(F.pad(tensor, (0, width - tensor.shape[1]), value=fill))
    return torch.cat(padded)
