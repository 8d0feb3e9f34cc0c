"""One optimizer update of an SAE: forward, gradients written out by hand, clipping, Adam. What training does over and over.

    loss      = (|x - x_hat|^2 / variance + auxk_alpha * AuxK / residual) / n            summed over the update's n vectors
    x_hat     = top_acts . W_dec[top_indices] + b_dec
    e         = x_hat - x;   s = 2 / (n variance)                                 s e = d loss / d x_hat (n, d)
    d_acts    = s e . W_dec[top_indices] where top_acts > 0                       d loss / d top_acts    (n, K)
    dW_dec[m] = sum of s top_acts e over the pairs (vector, place) of latent m;   db_dec    = sum of s e - db_enc W_enc
    dW_enc[m] = sum of d_acts (x - b_dec) over the same pairs;                    db_enc[m] = sum of d_acts

Several reconstructions of a vector (Multi-TopK, Matryoshka) are so many times as many pairs. Nothing of size (n, M) is made but
the product that latents are chosen from, and that by blocks. The rows of the two matrices' gradients are sums over a few
pairs each, so cheap that large ones are made twice, block by block, once for the norm that clips them and once where Adam
uses them (kernels/adam.py), and never exist as a whole. Nothing waits for the device but `list_dead`, now and then.

Sources: TopK, AuxK and Multi-TopK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4, A.2 and A.3; BatchTopK, Bussmann et
al. 2024 (arXiv 2412.06410); Matryoshka SAEs, Bussmann et al. 2025 (arXiv 2503.17547).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from errors import UsageError
from kernels import KEPT, Gradient, Selector, adam, decode_error, sort_pairs, squared_norm, sum_over, totals, update, weighted_sum
from kernels.topk import topk
from metrics import count_active
from processes import ALONE

REFRESH = 16  # updates between two looks at which latents are dead
WINDOW = 10  # updates over which BatchTopK's threshold is averaged


class Result(NamedTuple):
    loss: torch.Tensor
    """(): of the update's vectors, before it."""

    norm: torch.Tensor
    """(): of all gradients together, before they are clipped to 1."""

    e: torch.Tensor
    """(n, d): x_hat - x"""

    top_acts: torch.Tensor
    """(n, K): zeros are not active"""

    top_indices: torch.Tensor
    """(n, K) int64"""


class Step:
    """Updates an SAE, in place.

    variance: of the vectors, what the error is measured against. auxk_alpha: weight of AuxK, by which latents that were not
    active in the last `dead_feature_threshold` vectors learn to predict what the others leave over; which they are is looked
    at every REFRESH updates. normalize_decoder: rows of W_dec keep unit norm. multi_topk: 4 k latents are to reconstruct as
    well, with an eighth of the weight. matryoshka: numbers of latents; the first so many are to reconstruct as well, all with
    the same weight. dtype: of the product that chooses latents.
    graph: replay a CUDA graph instead of launching kernels one by one; not yet tried on a GPU.

    `state` holds all tensors that updates change, by name: the SAE's own, Adam's moments and step, `silent_for` (vectors since
    each latent was last active), `dead` (which were when last looked at), `residual` (mean |x - x_hat|^2 of the last update).
    Raises UsageError for variants that do not go together.
    """

    def __init__(
        self,
        sae,
        variance,
        auxk_alpha=1 / 32,
        dead_feature_threshold=100_000,
        normalize_decoder=True,
        multi_topk=False,
        matryoshka=(),
        dtype=None,
        vectors=ALONE,
        graph=False,
    ):
        M, device = len(sae.W_dec), sae.W_dec.device
        if multi_topk and (matryoshka or sae.activation != "topk"):
            raise UsageError("multi_topk goes with plain top-k alone, not with matryoshka, batch_topk or sample_topk")
        if wrong := [m for m in matryoshka if not 1 <= m <= sae.num_latents]:
            raise UsageError(f"matryoshka {wrong[0]}: expected 1 to num_latents = {sae.num_latents}")
        self.sae, self.variance, self.auxk_alpha, self.multi_topk = sae, variance, auxk_alpha, multi_topk
        self.dead_feature_threshold, self.normalize_decoder = dead_feature_threshold, normalize_decoder
        self.prefixes = sorted({*matryoshka, sae.num_latents})
        self.vectors, self.latents = vectors, sae.latents
        self.params = {name: p.data for name, p in sae.named_parameters()}
        self.state = {
            "silent_for": torch.zeros(M, dtype=torch.int64, device=device),
            "dead": torch.zeros(M, dtype=torch.bool, device=device),
            "residual": torch.ones((), device=device),
            "step": torch.zeros((), device=device),
            **self.params,
            **dict(sae.named_buffers()),
        }
        for name, p in self.params.items():
            self.state |= {f"{name}.exp_avg": torch.zeros_like(p), f"{name}.exp_avg_sq": torch.zeros_like(p)}
        self.graphs = {} if graph else None
        self.iteration, self.lr = 0, torch.zeros((), device=device)
        self.padded = device.type == "cuda"  # the list of dead latents has one of a few lengths, for CUDA graphs
        self.dead, self.num_dead = torch.zeros(0, dtype=torch.int64, device=device), 0  # of this process, of all
        self.select = Selector()
        W = self.params["encoder.weight"]
        kept = vectors.count > 1 or device.type == "cpu" and W.numel() <= KEPT
        self.memory = [torch.empty_like(W), torch.empty_like(W)] if kept else [None, None]  # for the gradients of both matrices
        self.copy = None if dtype in (None, W.dtype) else W.to(dtype)  # what the product multiplies by

    def load(self, tensors):
        """Take over a saved `state`; of processes that split the vectors the first has to give it."""
        for name, tensor in self.state.items():
            if self.vectors.index == 0:
                tensor.copy_(tensors[name])
            self.vectors.share(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor)
        self.iteration = int(self.state["step"])
        self.list_dead()
        if self.copy is not None:
            self.copy.copy_(self.params["encoder.weight"])

    def list_dead(self):
        """Indices of the dead latents, rising; `padded` to a power of two with the number past the last."""
        self.dead = self.state["dead"].nonzero().flatten()
        self.num_dead = len(self.dead)
        if self.latents.count > 1:
            self.num_dead = int(self.latents.sum(self.dead.new_tensor([self.num_dead])))
        if self.padded and len(self.dead):
            full = self.dead.new_full((1 << (len(self.dead) - 1).bit_length(),), len(self.sae.W_dec))
            full[: len(self.dead)] = self.dead
            self.dead = full

    @torch.no_grad()
    def __call__(self, x, lr, weights=None, parts=1, each=False, n=None):
        """One update by the vectors x (n, d), or whole samples (samples, tokens, d) for sample_topk: a Result.

        n: the update's vectors, where x is this process's part of them (None: x is all). weights (n,): of each vector's error in
        the loss (None: 1). parts: the product is made in so many, to save memory.
        each: batch_topk and sample_topk take of each vector alike, as they are to in the beginning of a training.
        """
        self.lr.fill_(lr)
        if self.auxk_alpha and self.iteration % REFRESH == 0:
            torch.ge(self.state["silent_for"], self.dead_feature_threshold, out=self.state["dead"])
            self.list_dead()
        self.iteration += 1
        if self.graphs is not None and x.is_cuda:
            return self.replay(x, weights, parts, each, n)
        return self.update(x, weights, parts, each, n)

    def replay(self, x, weights, parts, each, n):
        """`update` from a CUDA graph, one for each shape of its inputs; what it returns is overwritten by the next."""
        memory = self.select.pre_acts.data_ptr()  # a larger batch makes it anew
        key = (x.shape, weights is not None, parts, each, n, len(self.dead), memory)
        if key not in self.graphs:  # the first time as it is, which compiles the kernels
            self.graphs[key] = None
            return self.update(x, weights, parts, each, n)
        if self.graphs[key] is None:
            held, graph = (x.clone(), None if weights is None else weights.clone(), self.dead.clone()), torch.cuda.CUDAGraph()
            self.dead, current = held[2], self.dead
            with torch.cuda.graph(graph):  # runs nothing yet
                result = self.update(held[0], held[1], parts, each, n)
            self.dead, self.graphs[key] = current, (graph, held, result)
        graph, held, result = self.graphs[key]
        for mine, given in zip(held, (x, weights, self.dead)):
            if mine is not None:
                mine.copy_(given)
        graph.replay()
        return result

    def update(self, x, weights=None, parts=1, each=False, n=None):
        """All that a step does on the device, with no wait for it and the same shapes each time: what a CUDA graph captures."""
        W_enc, b_enc, W_dec, b_dec = (self.params[name] for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
        x, _, std = self.sae.standardize(x)
        tokens, x = x.shape[-2], x.flatten(0, -2)
        n, M, k = n or len(x), len(W_dec), self.sae.k  # n: vectors of all processes; M: latents of this one
        centred = x - b_dec

        # 1. Latents, and the errors of one or several reconstructions: (their weight, top_acts, top_indices) of each
        W = W_enc if self.copy is None else self.copy
        width = min(4 * k, self.sae.num_latents) if self.multi_topk else self.sae.width(tokens)
        chosen = [self.select(part, W, b_enc.to(W.dtype), min(width, M)) for part in centred.to(W.dtype).chunk(parts)]
        acts, indices = self.sae.of_all(*(torch.cat(found) if parts > 1 else found[0] for found in zip(*chosen)), width)
        acts = acts.to(x.dtype)
        step = self.state["step"].add_(1)
        if self.multi_topk:
            top_acts, places = topk(acts, k)
            terms = [(1 / 8, acts, indices), (1, top_acts, indices.gather(1, places))]
        else:
            acts, least = self.keep(acts, tokens, each, n)
            if least is not None:
                self.sae.threshold.lerp_(least.to(x.dtype), (1 / step).clamp(min=1 / WINDOW))
            share = 1 / len(self.prefixes)
            whole = self.sae.num_latents
            terms = [(share, acts * (indices < m) if m < whole else acts, indices) for m in self.prefixes]
        _, top_acts, top_indices = terms[-1]
        terms = [(share, *self.sae.of_own(acts, indices)) for share, acts, indices in terms]
        errors = [decode_error(x, acts, indices, W_dec, b_dec, self.latents) for _, acts, indices in terms]
        slope = torch.full((len(x), 1), 2 / (n * self.variance), device=x.device)
        if weights is not None:
            slope = slope * weights[:, None]
        squares = [torch.linalg.vector_norm(e, dim=1).square() @ slope[:, 0] / 2 for e, _ in errors]
        loss, e = sum(share * square for (share, _, _), square in zip(terms, squares)), errors[-1][0]

        # 2. Gradients of the parameters, as sums over pairs; those of latents that are not active come last, and count nowhere
        join = lambda parts: torch.cat([F.pad(p, (0, width - p.shape[1])) for p in parts]) if len(parts) > 1 else parts[0]
        order, ends = sort_pairs(join([torch.where(acts > 0, indices, M) for _, acts, indices in terms]), M)
        in_order = lambda parts: join(parts).flatten()[order]
        scaled = in_order([acts * (share * slope) for share, acts, _ in terms])
        d_acts = in_order([d * (share * slope) for (share, _, _), (_, d) in zip(terms, errors)])
        along = in_order([acts for _, acts, _ in terms]) * d_acts
        pairs = order // width  # which row of which reconstruction
        dW_enc = Gradient(d_acts, pairs % len(x) if len(terms) > 1 else pairs, ends, centred)
        dW_dec = Gradient(scaled, pairs, ends, torch.cat([e for e, _ in errors]) if len(terms) > 1 else e)
        db_enc, along = totals(d_acts, ends), totals(along, ends)  # along[m] = dW_dec[m] . W_dec[m]
        db_dec = sum((share * slope[:, 0]) @ e for (share, _, _), (e, _) in zip(terms, errors))
        active = count_active(*terms[-1][1:], M) > 0
        if self.num_dead:
            aux, rows, db, dense_enc, dense_dec, along_dead = self.auxk(centred, e, self.dead, slope * (self.variance / 2))
            loss, db_enc, along = loss + aux, db_enc.index_add(0, rows, db), along.index_add(0, rows, along_dead)
            dW_enc = dW_enc._replace(rows=self.dead, dense=dense_enc)
            dW_dec = dW_dec._replace(rows=self.dead, dense=dense_dec)
        dW_enc, dW_dec = (sum_over(self.vectors, g, memory) for g, memory in zip((dW_enc, dW_dec), self.memory))
        small = loss, squares[-1], db_enc, along, db_dec, active.to(x.dtype)
        loss, square, db_enc, along, db_dec, active = self.vectors.sum_all(*small)
        db_dec = db_dec - self.latents.sum(weighted_sum(db_enc, W_enc))
        along = along if self.normalize_decoder else None

        # 3. Clip and Adam
        norm = squared_norm(dW_enc) + squared_norm(dW_dec, along) + db_enc.square().sum()
        norm = (self.latents.sum(norm) + db_dec.square().sum()).sqrt()
        clip = norm.clamp(min=1.0)
        moments = lambda name: (self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"])
        update(W_enc, dW_enc, *moments("encoder.weight"), step, self.lr, clip, copy=self.copy)
        update(W_dec, dW_dec, *moments("W_dec"), step, self.lr, clip, along)
        for name, b, db in (("encoder.bias", b_enc, db_enc), ("b_dec", b_dec, db_dec)):
            adam([b], [db / clip], *([moment] for moment in moments(name)), step, self.lr)

        # 4. Who was active, and how much is left over
        self.state["silent_for"].add_(n).masked_fill_(active > 0, 0)
        self.state["residual"].copy_(square * self.variance).clamp_(min=1e-6 * self.variance)
        return Result(loss, norm, e if std is None else e * std.flatten()[:, None], top_acts, top_indices)

    def keep(self, acts, tokens, each, n):
        """The SAE's choice among the largest (n, K); batchtopk's is among those of all processes."""
        if self.vectors.count == 1 or self.sae.activation != "batchtopk":
            return self.sae.keep(acts, tokens, each)
        whole, here = acts.new_zeros(n, acts.shape[1]), self.vectors.part(n)
        whole[here] = acts
        kept, least = self.sae.keep(self.vectors.sum(whole), tokens, each)
        return kept[here], least

    def auxk(self, x, e, dead, weight):
        """How badly the dead latents predict what the others leave over, and what that adds to their gradients.

            e_hat = the k_aux largest activations among the dead latents, times their rows of W_dec;   AuxK = sum |-e - e_hat|^2

        x (n, d), less b_dec; e = x_hat - x (n, d), a constant; dead (C,) indices, M where there is none; weight (n, 1)
        of each vector, 1 / n if they are alike; k_aux = d / 2.
        Divided by the residual, AuxK is 1 where the dead latents predict nothing, as in openai/sparse_autoencoder; with the
        variance, as in sparsify, 25 % of 256 badly started latents stayed dead, not 1 %. sparsify's min(C / k_aux, 1) is not in
        it, nor of use: a dead latent has no other gradient, and Adam rescales it. The products are dense, but over the dead
        latents alone: at k_aux = d / 2 gathering rows would be dearer. Returns the loss, the latents' indices, the gradients of
        b_enc, W_enc, W_dec, and dW_dec[m] . W_dec[m].
        """
        k_aux = max(1, x.shape[1] // 2)
        rows = dead.clamp(max=len(self.params["W_dec"]) - 1)
        W_enc, b_enc, W_dec = (self.params[name][rows] for name in ("encoder.weight", "encoder.bias", "W_dec"))
        acts = torch.addmm(b_enc, x, W_enc.T).relu_()  # (n, C)
        if self.padded:
            acts *= dead < len(self.params["W_dec"])
        if (self.num_dead if self.latents.count > 1 else len(dead)) > k_aux:
            largest = topk(acts, min(k_aux, len(dead)))[0] if len(dead) else acts
            if self.latents.count > 1:
                largest = topk(self.latents.side_by_side(F.pad(largest, (0, k_aux - largest.shape[1]))), k_aux)[0]
            acts *= acts >= largest.amin(1, keepdim=True)
        left = e + self.latents.sum(acts @ W_dec) if self.latents.count > 1 else torch.addmm(e, acts, W_dec)  # e + e_hat
        scale = self.auxk_alpha * weight / self.state["residual"]
        g = left * (2 * scale)
        d_acts = (g @ W_dec.T) * (acts > 0)
        return (left.square() * scale).sum(), rows, d_acts.sum(0), d_acts.T @ x, acts.T @ g, (acts * d_acts).sum(0)
