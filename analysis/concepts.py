"""Which features belong to a concept: their activations on images with it, against those without.

    scores, images = image_scores(sae, activations)           # (P, S, M): images, steps, latents
    has_concept = with_word(prompts, "dotted")                # bool (P,)
    features, values = find_features(scores, has_concept, "contrast", 4)
    direction = toward(sae, scores, with_word(prompts, "striped"), has_concept)   # (d,)

A concept is a word of the prompts. The vectors of an activation file go through the SAE, and each
image keeps one number per step and latent, its *image score*: the mean (or largest) activation over
the tokens. Three measures say how well a latent's image scores tell the images with the concept from
those without:

    saeuron    a / sum(a) - b / sum(b) at each step, where a and b (M,) are the mean scores of the
               images with and without the concept, and the sums run over the latents
               (SAeUron, arXiv 2501.18052, section 4.2)
    contrast   (mean with - mean without) / standard deviation, of scores that are means over the
               steps; the standard deviation is the root of the mean of the two groups' variances
    auroc      the share of pairs (an image with, an image without) that the score puts in the right
               order; a tie counts one half
"""

from collections import Counter
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.metrics import usual_scale
from errors import UsageError
from sae import Sae
from store.dataset import Activations
from store.words import has_word, words_of

MAX_SCORES = 1 << 28  # image scores may take this many numbers, which are 1 GiB
MIN_IMAGES = 8  # images with a word from which on its contrast is more than chance
SHARE_WITH_WORD = 0.5  # of the images at most have a word that is exchanged
MIN_CLEARNESS = 1.0  # mean contrast that the features of a word must have, to be exchanged
MIN_EXPECTED = 2.0  # prompts that would have both words by chance, if the words were independent


def with_word(prompts: list[str], word: str) -> Tensor:
    """Return which prompts have a word, bool (P,); see `store.words.has_word`.

    prompts: as far as the model saw them, `store.prompts.seen_text` of each row. Raises UsageError
    if none of the prompts has the word, or all of them have it.
    """
    has = torch.tensor([has_word(str(prompt), word) for prompt in prompts])
    if has.any() and not has.all():
        return has

    number = "all" if has.any() else "none"
    raise UsageError(
        f"concept {word!r}: {number} of the {len(prompts)} prompts has it; "
        "expected some with and some without"
    )


@torch.no_grad()
def image_scores(
    sae: Sae,
    activations: Activations,
    pool: Literal["mean", "max"] = "mean",
    pictures: int | None = None,
    most: int = MAX_SCORES,
) -> tuple[Tensor, np.ndarray]:
    """Return each image's activation of every latent by step, and the numbers of these images.

    activations: of one hook point; images are numbered through all of its files. pool: what is
    taken over the tokens; padding of text does not count. pictures: take at most this many images.
    most: take fewer images if the scores were more numbers than this. The images are a choice with
    a fixed seed, in ascending order.

    Returns scores (P, S, M) float32 and numbers (P,). Raises UsageError for files whose vectors have
    another width than the SAE takes, and for files that are not (prompts, steps, tokens, d) with
    equal numbers of steps.
    """
    check_shapes(sae, activations)
    num_steps = activations.sources[0].S
    num_images = sum(file.P for file in activations.sources)
    fit = max(2, min(num_images, pictures or num_images, most // (num_steps * sae.num_latents)))
    chosen = np.sort(np.random.default_rng(0).permutation(num_images)[:fit])

    scores = torch.zeros(len(chosen), num_steps, sae.num_latents)
    bar = tqdm(chosen, "encoding", unit="picture", leave=False)
    for score, number in zip(scores, bar):
        x = activations.read_image(number).to(sae.W_dec.device).float()  # (S, T, d)
        if x.numel():  # a prompt without text has no tokens
            score.copy_(pooled_activations(sae, x, pool))
    return scores, chosen


def check_shapes(sae: Sae, activations: Activations) -> None:
    """Raise UsageError unless all files are (prompts, steps, tokens, d) with the same steps and the
    width that the SAE takes."""
    first = activations.sources[0]
    for file in activations.sources:
        if len(file.shape) == 4 and file.d == sae.d_in and file.S == first.S:
            continue
        steps = "steps" if file is first else first.S
        raise UsageError(
            f"{file.path} is {file.shape}; expected (prompts, {steps}, tokens, {sae.d_in})"
        )


def pooled_activations(sae: Sae, x: Tensor, pool: str) -> Tensor:
    """Return the mean or largest activation of each latent over the tokens: (S, T, d) -> (S, M)."""
    top_acts, top_indices, *_ = sae.encode(x)
    acts = top_acts.flatten(1)
    indices = top_indices.flatten(1)
    pooled = torch.zeros(len(x), sae.num_latents, device=x.device)
    if pool == "mean":
        return pooled.scatter_add_(1, indices, acts) / x.shape[1]
    return pooled.scatter_reduce_(1, indices, acts, "amax")


def scaled(scores: Tensor) -> Tensor:
    """Return the scores times their `usual_scale`, so that no square of them overflows.

    If that is 1, they are returned themselves and not copied, since they may take a GiB.
    """
    scale = usual_scale(scores)
    return scores if scale == 1 else scores * scale


def saeuron(scores: Tensor, has_concept: Tensor) -> Tensor:
    """Return SAeUron's score by step: scores (P, S, M), has_concept bool (P,) -> (S, M)."""
    scores = scaled(scores)
    a = scores[has_concept].mean(0)
    b = scores[~has_concept].mean(0)
    share_with = a / (a.sum(1, keepdim=True) + 1e-8)
    share_without = b / (b.sum(1, keepdim=True) + 1e-8)
    return share_with - share_without


def contrast(scores: Tensor, has_concept: Tensor) -> Tensor:
    """Return the difference of the groups' means in standard deviations, (M,).

    scores: (P, S, M) or (P, M); has_concept: bool (P,). For the scores 4, 6 with the concept and
    1, 3 without, the means are 5 and 2 and the standard deviation is 1, so the contrast is 3.
    """
    if scores.ndim == 3:
        scores = scores.mean(1)
    scores = scaled(scores)
    a = scores[has_concept]
    b = scores[~has_concept]
    variance = (a.var(0, correction=0) + b.var(0, correction=0)) / 2

    # a latent that hardly varies would have a huge contrast; this keeps it small
    deviation = variance.sqrt() + 1e-3 * scores.std() + 1e-12
    return (a.mean(0) - b.mean(0)) / deviation


def auroc(scores: Tensor, has_concept: Tensor) -> Tensor:
    """Return the area under the ROC curve of each column, float32 (M,).

    scores: (P, M); has_concept: bool (P,). A latent that is always higher with the concept has 1,
    and one that does not depend on it has 0.5.
    """
    a = scores[has_concept].T.contiguous()
    b = scores[~has_concept].T.contiguous().sort(dim=1).values
    num_below = torch.searchsorted(b, a, right=False)
    num_not_above = torch.searchsorted(b, a, right=True)
    twice_in_order = num_below + num_not_above  # a tie is in the second alone
    return twice_in_order.float().mean(1) / (2 * b.shape[1])


def find_features(
    scores: Tensor,
    has_concept: Tensor,
    how: Literal["contrast", "saeuron"] = "contrast",
    count: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the features that tell a concept best and their values, the best first.

    They are at most `count`. A feature whose value is 0 or less tells nothing of the concept, so it
    is left out, and there may be fewer or none. scores: (P, S, M); has_concept: bool (P,). The values
    of "saeuron" are means over the steps.
    """
    if how == "saeuron":
        values = saeuron(scores, has_concept).mean(0)
    else:
        values = contrast(scores, has_concept)
    top = values.topk(min(count, len(values)))
    tells = top.values > 0
    return top.indices[tells], top.values[tells]


def toward(sae: Sae, scores: Tensor, has_target: Tensor, has_source: Tensor) -> Tensor:
    """Return the direction in x from one concept to another, (d,) of length 1.

    It is the sum of the decoder rows of the latents that images of the target have more of than
    images of the source, each weighted by how much more. scores: (P, S, M); has_target, has_source:
    bool (P,). Raises UsageError if one of the two has no image.
    """
    if not has_target.any() or not has_source.any():
        raise UsageError(
            "of the two concepts one has no picture without the other, "
            "so there is no direction between them"
        )
    scores = scaled(scores)
    difference = scores[has_target].mean((0, 1)) - scores[has_source].mean((0, 1))
    more = difference.clamp_min(0)
    return torch.nn.functional.normalize(more.to(sae.W_dec) @ sae.W_dec.detach(), dim=0)


def clearest_exchange(scores: Tensor, prompts: list[str], count: int = 8) -> tuple[str, str] | None:
    """Return the two words of the prompts that are best exchanged, or None if there are no two.

    scores: (P, S, M). A word is as clear as the mean contrast of its `count` best features, and the
    clearer word comes first. No prompt has both, although by chance at least two would: such words
    exclude each other, as two colours of one thing do. On the toy they are "pink" and "black", two
    backgrounds.
    """
    scores = scores.mean(1)
    num_with_word = Counter()
    for prompt in prompts:
        num_with_word.update(set(words_of(prompt)))

    candidates = []  # (clearness, word, which images have it)
    for word, number in sorted(num_with_word.items()):
        if not MIN_IMAGES <= number <= SHARE_WITH_WORD * len(prompts):
            continue
        has = torch.tensor([has_word(prompt, word) for prompt in prompts])
        values = contrast(scores, has)
        value = float(values.topk(min(count, len(values))).values.mean())
        if value >= MIN_CLEARNESS:
            candidates.append((value, word, has))
    candidates.sort(key=lambda candidate: -candidate[0])

    # the first pair that is found has the largest clearness of its less clear word
    for i, (_, other, has_other) in enumerate(candidates):
        for _, word, has in candidates[:i]:
            expected = int(has.sum()) * int(has_other.sum()) / len(prompts)
            if expected >= MIN_EXPECTED and not (has & has_other).any():
                return word, other
    return None
