"""Which rows of a denoiser's batch are conditional: read off what guidance makes of them.

Where several chunks of rows (unconditional, conditional, ...) reach one step of the scheduler, guidance has mixed them linearly
into its `model_output`, s c + (1 - s) u, so least squares over the denoiser's own output chunks gives the weights back, and the
conditional chunk is the one of the largest weight. A network of which nothing is in there is no denoiser.
"""

import torch

from errors import UsageError
from signatures import tensors

CONTEXTS = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond"}  # names of cache_context


def guidance_weights(chunks, model_output):
    """Weight of each chunk in `model_output ~ sum_i w_i chunk_i`, by least squares in float64: (weights, certain).

    chunks: list of (R, ...) tensors, model_output: (R, ...). weights: list of floats, 0 for a chunk that is smaller than the
    model output. certain: list of bool, False where other chunks could take a chunk's place (identical predictions), which
    then share its weight. What a chunk has past the model output's shape (a learned variance, tokens of a reference image)
    is left out.
    """
    target = model_output.detach().cpu().double()
    columns = torch.zeros(len(chunks), target.numel(), dtype=torch.float64)
    for i, chunk in enumerate(chunks):
        a, b = chunk.detach().cpu().double(), target[: len(chunk)]
        if a.numel() != b.numel() and a.ndim == b.ndim and all(m >= n for m, n in zip(a.shape, b.shape)):
            a = a[tuple(slice(n) for n in b.shape)]
        if a.numel() == b.numel():
            columns[i, : a.numel()] = a.flatten()
    sizes = columns.norm(dim=1).clamp_min(1e-300)
    A = (columns / sizes[:, None]).T
    inverse = torch.linalg.pinv(A, rtol=1e-6)
    certain = (inverse @ A).diagonal() > 1 - 1e-6
    return (inverse @ target.flatten() / sizes).tolist(), certain.tolist()


def same(a, b):
    """Whether two lists of tensors, or of lists of tensors, are equal in every number."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return torch.equal(a, b)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


def assign_roles(forwards, model_output, R):
    """Fill `roles` of every forward of one step, `R` rows a chunk. Returns the forwards that took part in the prediction.

    In this order: the name of the context a forward ran in; a single chunk is conditional; one that guidance subtracts is
    not; where the conditioning of one chunk is the same for all rows and another's is not, the latter is; then the chunk of
    the largest weight is. Of several others, one with the conditional chunk's own conditioning is a perturbed pass
    ("other"), and the unconditional one is all zeros wherever it differs from the rest. Raises UsageError where rows can't
    be told.
    """
    if all(f.context in CONTEXTS and f.rows == R for f in forwards):
        for f in forwards:
            f.roles = [CONTEXTS[f.context]]
        return forwards
    part = lambda x, c: x[c * R : (c + 1) * R]
    chunks = [(f, c) for f in forwards for c in range(f.rows // R)]
    known = len(chunks) > 1 and all(f.output is not None for f, _ in chunks)
    outputs = [part(f.output, c) for f, c in chunks] if known else []
    weights, certain = guidance_weights(outputs, model_output) if known else ([], [False])
    if known and len({f.denoiser for f in forwards}) > 1:
        sizes = [abs(w) * x.norm().item() for w, x in zip(weights, outputs)]
        used = {f.denoiser for s, (f, _) in zip(sizes, chunks) if s >= 1e-3 * max(sizes)}
        weights, certain = zip(*(wc for *wc, (f, _) in zip(weights, certain, chunks) if f.denoiser in used))
        forwards = [f for f in forwards if f.denoiser in used]
        chunks = [(f, c) for f, c in chunks if f.denoiser in used]
    for f in forwards:
        if f.rows % R:
            raise UsageError(
                f"the denoiser got {f.rows} rows, which is no multiple of {R} (prompts x images per prompt): "
                "say how many prompts there are"
            )
        f.roles = ["other"] * (f.rows // R)
    inputs = [[part(x, c) for x in f.conditioning] for f, c in chunks]
    varying = [i for i, parts in enumerate(inputs) if any(not same(x[:1], x[r : r + 1]) for x in parts for r in range(1, R))]
    negative = {i for i, w in enumerate(weights) if w * sum(weights) < -1e-3} if all(certain) else set()  # never conditional
    kept = [i for i in range(len(chunks)) if i not in negative]
    candidates = [i for i in varying if i in kept] or kept
    best = candidates[-1]
    if len(candidates) > 1:
        if all(certain):
            if len(weights) == 2 and min(weights) > 0.01:
                raise UsageError(
                    f"can't tell conditional from unconditional rows at a guidance scale between 0 and 1 ({max(weights):.2f}): "
                    "use two prompts or more"
                )
            best = max(candidates, key=lambda i: abs(weights[i]))
        elif not all(same(i, inputs[0]) for i in inputs):
            raise UsageError(  # an empty prompt has the rows of the empty negative prompt, and then any label is right
                "can't tell conditional from unconditional rows: the denoiser predicts the same for both "
                "(is its last layer still zero?)"
            )
    rest = [i for i in range(len(chunks)) if i != best]
    if all(certain):  # a pass with the conditional chunk's own conditioning was perturbed, if its prediction is another
        rest = [i for i in rest if not same(inputs[i], inputs[best])]
    if len(rest) > 1:
        whole = [[part(f.sample, c), *inputs[i]] for i, (f, c) in enumerate(chunks)]
        rest = [i for i in rest if all(is_less(whole[i], whole[j]) for j in rest if j != i)]
    for i, (f, c) in enumerate(chunks):
        f.roles[c] = "cond" if i == best else "uncond" if rest == [i] else "other"
    return forwards


def is_less(a, b):
    """Whether inputs `a` are zero wherever they differ from inputs `b`, and somewhere differ."""
    pairs = [(x, y) for x, y in zip(tensors(a), tensors(b)) if not torch.equal(x, y)]
    return bool(pairs) and all(x.shape == y.shape and not x[x != y].any() for x, y in pairs)
