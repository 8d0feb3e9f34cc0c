"""Which features are of a concept: their activations on pictures with it, against those without.

An activation file's vectors go through the SAE, and each picture keeps, for every step and latent,
its mean (or largest) activation over the tokens: the *image score*. A concept is a word of the
prompts.

    saeuron    s = a / sum(a) - b / sum(b): a, b (M,) the mean score of pictures with and without it, sums over latents; one a
               step (SAeUron, arXiv 2501.18052, section 4.2)
    contrast   (mean with - mean without) / standard deviation, root of the groups' mean variance; of scores meant over steps
    auroc      the share of pairs (a picture with, one without) that the score puts in the right order; ties count half
"""

import numpy as np
import torch
from tqdm import tqdm

from analysis.metrics import usual_scale
from errors import UsageError
from store.words import has_word

MOST = 1 << 28  # numbers that image scores may take: 1 GiB


def with_word(prompts, word):
    """bool (P,): which prompts have the word, see store/words.py. Raises UsageError where none has,
    or all have.

    prompts: as far as the model sees them, `store.prompts.seen_text` of a row.
    """
    found = torch.tensor([has_word(str(prompt), word) for prompt in prompts])
    if not found.any() or found.all():
        number = "none" if not found.any() else "all"
        raise UsageError(
            f"concept {word!r}: {number} of the {len(prompts)} prompts has it; expected some with and some without"
        )
    return found


@torch.no_grad()
def image_scores(sae, activations, pool="mean", pictures=None, most=MOST):
    """Each picture's activation of every latent by step: ((P, S, M) float32, which pictures those
    are (P,)).

    activations: of one hook point; pictures are numbered through all of its files. pool: mean or
    max over the tokens; padding of text does not count. P is at most `pictures`, and fewer, a
    seeded choice, where all would be more than `most` numbers. Raises UsageError for files of
    another width, or not of (prompts, steps, tokens, d) with the same steps.
    """
    S, M = activations.sources[0].S, sae.num_latents
    for file in activations.sources:
        if len(file.shape) != 4 or file.d != sae.d_in or file.S != S:
            steps = "steps" if file is activations.sources[0] else S
            raise UsageError(
                f"{file.path} is {file.shape}; expected (prompts, {steps}, tokens, {sae.d_in})"
            )
    P = sum(file.P for file in activations.sources)
    fit = max(2, min(P, pictures or P, most // (S * M)))
    chosen = np.sort(np.random.default_rng(0).permutation(P)[:fit])
    scores = torch.zeros(len(chosen), S, M)
    for out, picture in zip(scores, tqdm(chosen, "encoding", unit="picture", leave=False)):
        x = activations.read_image(picture).to(sae.W_dec.device).float()
        if not x.numel():  # a prompt without text
            continue
        acts, indices = (codes.flatten(1) for codes in sae.encode(x)[:2])
        pooled = torch.zeros(S, M, device=x.device)
        if pool == "mean":
            out.copy_(pooled.scatter_add_(1, indices, acts) / x.shape[1])
        else:
            out.copy_(pooled.scatter_reduce_(1, indices, acts, "amax"))
    return scores, chosen


def scaled(scores):
    """The scores times their `usual_scale`: themselves, not a copy, where that is 1, since they may
    take a GiB."""
    scale = usual_scale(scores)
    return scores if scale == 1 else scores * scale


def saeuron(scores, there):
    """SAeUron's score by step: scores (P, S, M), there bool (P,) -> (S, M)."""
    scores = scaled(scores)
    a, b = scores[there].mean(0), scores[~there].mean(0)
    return a / (a.sum(1, keepdim=True) + 1e-8) - b / (b.sum(1, keepdim=True) + 1e-8)


def contrast(scores, there):
    """Difference of means in standard deviations: scores (P, S, M) or (P, M), there bool (P,) ->
    (M,)."""
    scores = scores.mean(1) if scores.ndim == 3 else scores
    scores = scaled(scores)
    a, b = scores[there], scores[~there]
    variance = (a.var(0, correction=0) + b.var(0, correction=0)) / 2
    return (a.mean(0) - b.mean(0)) / (
        variance.sqrt() + 1e-3 * scores.std() + 1e-12
    )  # one that never varies is no feature


def auroc(scores, there):
    """Area under the ROC curve of each column: scores (P, M), there bool (P,) -> (M,) float32."""
    a, b = scores[there].T.contiguous(), scores[~there].T.contiguous().sort(dim=1).values
    below = torch.searchsorted(b, a, right=False) + torch.searchsorted(b, a, right=True)
    return below.float().mean(1) / (2 * b.shape[1])


def find_features(scores, there, how="contrast", count=1):
    """The features that speak most for a concept: `count` of them, the best first, with their
    scores, (count,) each."""
    values = {
        "saeuron": lambda: saeuron(scores, there).mean(0),
        "contrast": lambda: contrast(scores, there),
    }[how]()
    top = values.topk(min(count, len(values)))
    return top.indices, top.values


def toward(sae, scores, there, away):
    """The direction in x, (d,) of length 1, of the latents that pictures `there` have more of than
    those in `away`.

    scores: (P, S, M); there, away: bool (P,). Raises UsageError where one of them has no picture.
    """
    if not there.any() or not away.any():
        raise UsageError(
            "of the two concepts one has no picture without the other, so there is no direction between them"
        )
    scores = scaled(scores)
    more = (scores[there].mean((0, 1)) - scores[away].mean((0, 1))).clamp_min(0)
    return torch.nn.functional.normalize(more.to(sae.W_dec) @ sae.W_dec.detach(), dim=0)
