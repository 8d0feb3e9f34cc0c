"""One optimizer update of an SAE: forward, gradients written out by hand, clipping, Adam. What training does over and over.

    loss      = (|x - x_hat|^2 / variance + auxk_alpha * AuxK / residual) / n            summed over the update's n vectors
    x_hat     = top_acts . W_dec[top_indices] + b_dec
    g         = 2 (x_hat - x) / (n variance)                                      d loss / d x_hat      (n, d)
    d_acts    = g . W_dec[top_indices] where top_acts > 0                         d loss / d top_acts   (n, k)
    dW_dec[m] = sum of top_acts g over the pairs (vector, place) of latent m;     db_dec    = sum of g - db_enc W_enc
    dW_enc[m] = sum of d_acts (x - b_dec) over the same pairs;                    db_enc[m] = sum of d_acts

Nothing of size (n, M) is made but the product that latents are chosen from, and that by blocks. The rows of the two
matrices' gradients are sums over a few pairs each, so cheap that large ones are made twice, block by block, once for the
norm that clips them and once where Adam uses them (kernels/adam.py), and never exist as a whole.

Sources: TopK, AuxK and Multi-TopK, Gao et al. 2024 (arXiv 2406.04093), sections 2.3, 2.4, A.2 and A.3.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import KEPT, Gradient, Selector, adam, decode_error, sort_pairs, squared_norm, totals, update
from sae import count_active

MATRICES = ("encoder.weight", "W_dec")


class Result(NamedTuple):
    loss: torch.Tensor
    """(): of the update's vectors, before it."""

    norm: torch.Tensor
    """(): of all gradients together, before they are clipped to 1."""

    x_hat: torch.Tensor
    """(n, d)"""

    top_acts: torch.Tensor
    """(n, k)"""

    top_indices: torch.Tensor
    """(n, k) int64"""


class Step:
    """Updates an SAE, in place.

    variance: of the vectors, what the error is measured against. auxk_alpha: weight of AuxK, by which latents that were not
    active in the last `dead_feature_threshold` vectors learn to predict what the others leave over. normalize_decoder: rows
    of W_dec keep unit norm. multi_topk: 4 k latents are to reconstruct as well, with an eighth of the weight. dtype: of the
    product that chooses latents.

    `state` holds all tensors that updates change, by name: the SAE's own, Adam's moments and step, `silent_for` (vectors
    since each latent was last active), `residual` (mean |x - x_hat|^2 of the last update).
    """

    def __init__(
        self,
        sae,
        variance,
        auxk_alpha=1 / 32,
        dead_feature_threshold=100_000,
        normalize_decoder=True,
        multi_topk=False,
        dtype=None,
    ):
        self.sae, self.variance, self.auxk_alpha, self.multi_topk = sae, variance, auxk_alpha, multi_topk
        self.dead_feature_threshold, self.normalize_decoder = dead_feature_threshold, normalize_decoder
        self.params = {name: p.data for name, p in sae.named_parameters()}
        device = sae.W_dec.device
        self.state = {
            "silent_for": torch.zeros(sae.num_latents, dtype=torch.int64, device=device),
            "residual": torch.ones((), device=device),
            "step": torch.zeros((), device=device),
            **self.params,
        }
        for name, p in self.params.items():
            self.state |= {f"{name}.exp_avg": torch.zeros_like(p), f"{name}.exp_avg_sq": torch.zeros_like(p)}
        self.select = Selector()
        W = self.params["encoder.weight"]
        kept = device.type == "cpu" and W.numel() <= KEPT
        self.memory = [torch.empty_like(W), torch.empty_like(W)] if kept else [None, None]  # for the gradients of both matrices
        self.copy = None if dtype in (None, W.dtype) else W.to(dtype)  # what the product multiplies by

    def load(self, tensors):
        """Take over a saved `state`."""
        for name, tensor in tensors.items():
            self.state[name].copy_(tensor)
        if self.copy is not None:
            self.copy.copy_(self.params["encoder.weight"])

    @torch.no_grad()
    def __call__(self, x, lr, parts=1):
        """One update by the vectors x (n, d), whose product is made in so many parts: a Result."""
        n, k = len(x), self.sae.k
        W_enc, b_enc, W_dec, b_dec = (self.params[name] for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
        centred = x - b_dec

        # 1. Forward, and the gradient of x_hat and of the activations
        W = W_enc if self.copy is None else self.copy
        wanted = min(4 * k, len(W)) if self.multi_topk else k
        chosen = [self.select(part.to(W.dtype), W, b_enc.to(W.dtype), wanted) for part in centred.chunk(parts)]
        all_acts, all_indices = (torch.cat(found) if parts > 1 else found[0] for found in zip(*chosen))
        all_acts = all_acts.to(x.dtype)
        top_acts, top_indices = all_acts, all_indices
        if self.multi_topk:
            top_acts, places = all_acts.topk(k)
            top_indices = all_indices.gather(1, places)
        e, d_acts = decode_error(x, top_acts, top_indices, W_dec, b_dec)
        error = e.square().sum()
        scale = 2 / (n * self.variance)
        loss, g, d_acts = error / (n * self.variance), e * scale, d_acts * scale
        acts, indices, gs, xs = top_acts, top_indices, g, centred
        if self.multi_topk:
            e_all, d_all = decode_error(x, all_acts, all_indices, W_dec, b_dec)
            loss = loss + e_all.square().sum() / (8 * n * self.variance)
            g_all = e_all * (scale / 8)
            pad = (0, wanted - k)  # of another latent's pair with no weight
            acts, indices = torch.cat([F.pad(top_acts, pad), all_acts]), torch.cat([F.pad(top_indices, pad), all_indices])
            d_acts, gs, xs = torch.cat([F.pad(d_acts, pad), d_all * (scale / 8)]), torch.cat([g, g_all]), torch.cat([centred] * 2)
            g = g + g_all

        # 2. Gradients of the parameters, as sums over pairs
        order, ends = sort_pairs(indices, len(W_dec))
        vectors, acts, d_acts = order // indices.shape[1], acts.flatten()[order], d_acts.flatten()[order]
        dW_enc, dW_dec = Gradient(d_acts, vectors, ends, xs), Gradient(acts, vectors, ends, gs)
        db_enc, along = totals(d_acts, ends), totals(acts * d_acts, ends)  # along[m] = dW_dec[m] . W_dec[m]
        dead = (self.state["silent_for"] >= self.dead_feature_threshold).nonzero().flatten()
        if self.auxk_alpha and len(dead):
            aux, dense_enc, db, dense_dec, along_dead = self.auxk(centred, e, dead, n)
            loss, dW_enc, dW_dec = (
                loss + aux,
                dW_enc._replace(rows=dead, dense=dense_enc),
                dW_dec._replace(rows=dead, dense=dense_dec),
            )
            db_enc, along = db_enc.index_add(0, dead, db), along.index_add(0, dead, along_dead)
        db_dec = g.sum(0) - db_enc @ W_enc
        along = along if self.normalize_decoder else None
        dW_enc, dW_dec = (gradient.keep(memory) for gradient, memory in zip((dW_enc, dW_dec), self.memory))

        # 3. Clip and Adam
        norm = (squared_norm(dW_enc) + squared_norm(dW_dec, along) + db_enc.square().sum() + db_dec.square().sum()).sqrt()
        clip = norm.clamp(min=1.0)
        moments = lambda name: (self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"])
        step = self.state["step"].add_(1)
        update(W_enc, dW_enc, *moments("encoder.weight"), step, lr, clip, copy=self.copy)
        update(W_dec, dW_dec, *moments("W_dec"), step, lr, clip, along)
        for name, b, db in (("encoder.bias", b_enc, db_enc), ("b_dec", b_dec, db_dec)):
            adam([b], [db], *([moment] for moment in moments(name)), step, lr, clip)

        # 4. Who was active, and how much is left over
        active = count_active(top_acts, top_indices, len(W_dec)) > 0
        self.state["silent_for"].add_(n).masked_fill_(active, 0)
        self.state["residual"].copy_(error / n).clamp_(min=1e-6 * self.variance)
        return Result(loss, norm, x + e, top_acts, top_indices)

    def auxk(self, x, e, dead, n):
        """How badly the dead latents predict what the others leave over, and what that adds to their gradients.

            e_hat = the k_aux largest activations among the dead latents, times their rows of W_dec;   AuxK = sum |-e - e_hat|^2

        x (n, d), less b_dec; e = x_hat - x (n, d), a constant; dead (C,) indices; k_aux = d / 2. Divided by the residual, AuxK
        is 1 where the dead latents predict nothing, as in openai/sparse_autoencoder; with the variance, as in sparsify, 25 % of
        256 badly started latents stayed dead, not 1 %. sparsify's min(C / k_aux, 1) is not in it, nor of use: a dead latent has
        no other gradient, and Adam rescales it. The products are dense, but over the dead latents alone: at k_aux = d / 2
        gathering rows would be dearer. Returns the loss and the gradients of W_enc, b_enc, W_dec, and dW_dec[m] . W_dec[m].
        """
        k_aux = max(1, x.shape[1] // 2)
        W_enc, b_enc, W_dec = (self.params[name][dead] for name in ("encoder.weight", "encoder.bias", "W_dec"))
        acts = torch.addmm(b_enc, x, W_enc.T).relu_()  # (n, C)
        if len(dead) > k_aux:
            acts *= acts >= acts.topk(k_aux).values[:, -1:]
        left = torch.addmm(e, acts, W_dec)  # e + e_hat
        scale = self.auxk_alpha / (n * self.state["residual"])
        g = left * (2 * scale)
        d_acts = (g @ W_dec.T) * (acts > 0)
        return left.square().sum() * scale, d_acts.T @ x, d_acts.sum(0), acts.T @ g, (acts * d_acts).sum(0)
