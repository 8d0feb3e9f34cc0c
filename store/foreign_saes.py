"""SAE files of other packages: read those of SAELens and dictionary_learning, write SAELens'.

    sae.safetensors         + cfg.json      ours, sparsify, universal-diffsae (sae.py reads them)
    sae_weights.safetensors + cfg.json      SAELens: topk, jumprelu, standard (a ReLU)
    ae.pt                   + config.json   dictionary_learning: AutoEncoderTopK, AutoEncoder,
                                            JumpReluAutoEncoder, and BatchTopKSAE and
                                            MatryoshkaBatchTopKSAE with their threshold

Reading takes two steps. `read_saelens` or `read_dictionary_learning` checks a description, and
returns what the file holds in the words of this page, a `Foreign`. `read_foreign` turns that into
the description and the tensors of a folder of ours. To add a format, write a table of its
tensors and a function like `read_dictionary_learning`, and name its file in WEIGHTS and READERS.

All kinds but the TopK ones become "jumprelu". If the file names no k, k is num_latents, the most
that can be active. These are folded into the weights, in float64: SAELens'
rescale_acts_by_decoder_norm; inputs from which b_dec is not subtracted; and the decoder norms of
AutoEncoder, by which dictionary_learning divides when it loads one.

Whatever can't be had exactly is refused: gated and other kinds, normalised inputs, hook_z. SAELens'
layer_norm is not our input_unit_norm: it divides by the deviation of d - 1 degrees of freedom plus
1e-5, and multiplies by it without the 1e-5. A key of a description that is not known here, and not
switched off, is refused too, since it may change what the SAE computes.

Written for SAELens: topk stays topk. batchtopk becomes jumprelu, which keeps pre_acts above a
threshold, where ours keeps those that reach it: so the threshold is written one step of float32
lower. jumprelu has no limit on how many latents of a vector are active; our batchtopk has 8 k.
sampletopk and input_unit_norm are refused, since SAELens can't express them.

Checked against sae-lens 6.54 and dictionary-learning 0.1 (tests/test_foreign_saes.py).
"""

import json
import pickle
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errors import UsageError
from store.disk import read_json, save_tensors, write_json

WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "ae.pt")

# ---- the tensors of each kind of SAE: {name: its axes}
#
# d is the width of the input, M the number of latents, G any other number; "" is a single number

Axes = dict[str, str]

MATRICES = {"W_enc": "dM", "b_enc": "M", "W_dec": "Md", "b_dec": "d"}
LINEAR_LAYERS = {"encoder.weight": "Md", "encoder.bias": "M", "decoder.weight": "dM"}

SAELENS: dict[str, Axes] = {  # by "architecture"
    "topk": MATRICES,
    "standard": MATRICES,
    "jumprelu": {**MATRICES, "threshold": "M"},
}
DICTIONARY_LEARNING: dict[str, Axes] = {  # by "dict_class"
    "AutoEncoder": {**LINEAR_LAYERS, "bias": "d"},
    "AutoEncoderTopK": {**LINEAR_LAYERS, "b_dec": "d", "k": "", "threshold": ""},
    "BatchTopKSAE": {**LINEAR_LAYERS, "b_dec": "d", "k": "", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**MATRICES, "k": "", "threshold": "", "group_sizes": "G"},
    "JumpReluAutoEncoder": {**MATRICES, "threshold": "M"},
}
# Tensors that files of earlier versions do not have
ADDED_LATER = {"AutoEncoderTopK": ("k", "threshold"), "BatchTopKSAE": ("k",)}

# ---- the keys of each description
#
# They say how the SAE was trained, on what, or what is read elsewhere in this project. Another key
# may change what the SAE computes, so a description that has one is refused.

SPARSIFY_KEYS = {  # sparsify's and universal-diffsae's
    "activation",
    "d_in",
    "expansion_factor",
    "k",
    "multi_topk",
    "normalize_decoder",
    "num_latents",
}
# Ours, besides those. A description that train.py wrote is known by the digest of its data instead
OUR_KEYS = set(
    """
    always_on by_timestep collected_with collections cosine data data_relative_to dead
    dictionary_learning explained_variance fingerprint fvu held_out_whole_prompts hook_name
    input_unit_norm l0 model_dtype model_name num_held_out num_training num_training_in_data
    num_training_prompts padding rows sae_fingerprint saelens side stream tokens_per_sample training
    """.split()
)
# Of these, False means that something is switched off, as it is here
OFF_IS_USUAL = {
    "abs_topk",
    "batch_topk",
    "dataset_norm",
    "jumprelu",
    "sample_topk",
    "signed",
    "skip_connection",
    "transcode",
}
# What an export of ours says of its hook point, which comes back when it is read
OURS_EXPORTED = (
    "side",
    "stream",
    "rows",
    "padding",
    "fingerprint",
    "model_dtype",
    "collections",
    "collected_with",
)
SAELENS_KEYS = set(
    """
    apply_b_dec_to_input architecture d_in d_sae device dtype k metadata normalize_activations
    rescale_acts_by_decoder_norm reshape_activations
    """.split()
)
# SAELens before version 6, when options of the training stood beside the others
OLD_SAELENS_KEYS = SAELENS_KEYS | set(
    """
    act_store_device activation_fn activation_fn_kwargs activation_fn_str adam_beta1 adam_beta2
    autocast autocast_lm b_dec_init_method cached_activations_path checkpoint_path compile_llm
    compile_sae context_size dataset_path dataset_trust_remote_code dead_feature_threshold
    dead_feature_window decoder_heuristic_init decoder_orthogonal_init eval_batch_size_prompts
    eval_every_n_wandb_logs expansion_factor feature_sampling_window finetuning_method
    finetuning_scaling_factor finetuning_tokens from_pretrained_path hook_eval hook_head_index
    hook_layer hook_name hook_point hook_point_head_index hook_point_layer
    init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold l1_coefficient l1_warm_up_steps log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb lp_norm lr lr_decay_steps lr_end lr_scheduler_name
    lr_warm_up_steps model_class_name model_from_pretrained_kwargs model_kwargs model_name
    mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles
    neuronpedia_id noise_alpha normalize_sae_decoder prefer_float_from_disk prepend_bos resume
    run_name sae_lens_training_version sae_lens_version scale_sparsity_penalty_by_decoder_norm seed
    seqpos_slice store_batch_size store_batch_size_prompts streaming tokens_per_buffer
    train_batch_size train_batch_size_tokens training_tokens use_cached_activations use_ghost_grads
    verbose wandb_entity wandb_id wandb_log_frequency wandb_project
    """.split()
)
# dictionary_learning's "trainer"
TRAINER_KEYS = set(
    """
    activation_dim anneal_end anneal_start auxk_alpha bandwidth decay_start device dict_class
    dict_size group_fractions group_sizes group_weights initial_sparsity_penalty k l1_penalty layer
    lm_name lr n_sparsity_updates norm_factor p_end p_start resample_steps seed sparsity_function
    sparsity_loss sparsity_penalty sparsity_queue_length sparsity_warmup_steps steps submodule_name
    target_l0 threshold_beta threshold_start_step top_k_aux trainer_class wandb_name warmup_steps
    """.split()
)


# ---- finding and checking


def find_weights(path: str | Path) -> Path:
    """Return the file with the weights of an SAE folder; `path` is the folder or that file itself.

    Raises FileNotFoundError if there is none, and UsageError if there are several, or if the file
    has no name of WEIGHTS.
    """
    path = Path(path)
    if path.is_file():
        if path.name not in WEIGHTS:
            raise UsageError(f"{path}: expected an SAE folder, or in it {', '.join(WEIGHTS)}")
        return path
    files = [path / name for name in WEIGHTS if (path / name).exists()]
    if not files:
        raise FileNotFoundError(f"{path} is no SAE folder: it has none of {', '.join(WEIGHTS)}")
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise UsageError(f"{path} has {names}; name the one that is meant")
    return files[0]


def check_keys(path: Path, cfg: dict[str, Any], known: Collection[str]) -> None:
    """Raise UsageError for a key of a description that is not known, unless it says nothing.

    An empty value says nothing, and so does False for a key of OFF_IS_USUAL.
    """
    for key, value in cfg.items():
        is_off = value is False and key in OFF_IS_USUAL
        says_nothing = is_off or value in (None, "none", "", [], {})
        if key not in known and not says_nothing:
            raise UsageError(
                f"{path} says {key} {repr(value)[:60]}, which is not known here and may change "
                "what the SAE computes; it can't be loaded. If it changes nothing, remove it from "
                "a copy of the file"
            )


# ---- reading


class Foreign(NamedTuple):
    """What a file of another package holds."""

    tensors: dict[str, Tensor]
    """{the package's own name: float32 tensor}."""

    activation: str
    """As in our files: "topk" or "jumprelu"."""

    k: int | None
    """Active latents per vector; None if the file does not say."""

    threshold: Tensor
    """(M,), (1,) or (): a latent is active if its pre_acts are above it. Not used for topk."""

    subtracts_b_dec: bool
    """Whether b_dec is subtracted from the input before it is encoded."""

    divides_by_norms: bool
    """Whether the norms of the decoder's vectors are divided out of the decoder, and multiplied
    into the encoder."""

    provenance: dict[str, Any]
    """What our cfg.json shall say about where the SAE comes from."""


def read_foreign(weights: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read another package's SAE; return its description and its tensors as our files hold them.

    weights: the package's file of weights, beside which its description lies. The tensors are
    encoder.weight (M, d), encoder.bias (M,), W_dec (M, d), b_dec (d,), and for jumprelu threshold
    (M,), all float32.

    Raises UsageError for what can't be read, or could only be approximated, and FileNotFoundError
    if the description is missing.
    """
    foreign = READERS[weights.name](weights)
    W_enc, b_enc, W_dec, b_dec = matrices_of(foreign.tensors)
    if foreign.divides_by_norms:
        norms = W_dec.norm(dim=1, keepdim=True)  # (M, 1)
        W_enc = W_enc * norms
        b_enc = b_enc * norms[:, 0]
        W_dec = W_dec / norms.clamp_min(torch.finfo(torch.float32).tiny)
    if not foreign.subtracts_b_dec:
        # W_enc @ x + b_enc = W_enc @ (x - b_dec) + (b_enc + W_enc @ b_dec)
        b_enc = b_enc + W_enc @ b_dec

    M, d = W_dec.shape
    k = foreign.k
    state = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if foreign.activation == "jumprelu":
        state["threshold"] = foreign.threshold.expand(M)
        k = k or M
    cfg = {**foreign.provenance, "activation": foreign.activation, "k": k, "d_in": d}
    return cfg, {name: tensor.float() for name, tensor in state.items()}


def matrices_of(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W_enc (M, d), b_enc (M,), W_dec (M, d) and b_dec (d,) in float64.

    tensors: those of LINEAR_LAYERS, or of MATRICES; dictionary_learning's AutoEncoder calls its
    b_dec "bias".
    """
    if "encoder.weight" in tensors:
        W_enc = tensors["encoder.weight"]
        b_enc = tensors["encoder.bias"]
        W_dec = tensors["decoder.weight"].T
    else:
        W_enc = tensors["W_enc"].T
        b_enc = tensors["b_enc"]
        W_dec = tensors["W_dec"]
    b_dec = tensors["bias"] if "bias" in tensors else tensors["b_dec"]
    return W_enc.double(), b_enc.double(), W_dec.double(), b_dec.double()


def read_dictionary_learning(weights: Path) -> Foreign:
    """Return the SAE in dictionary_learning's ae.pt and config.json. Raises as `read_foreign`
    does."""
    # 1. The description: which kind, and nothing that is not known here
    path = weights.with_name("config.json")
    cfg = read_description(path)
    check_keys(path, cfg, {"trainer", "buffer"})
    trainer = cfg.get("trainer")
    if not isinstance(trainer, dict):
        trainer = {}
    kind = trainer.get("dict_class")
    if kind not in DICTIONARY_LEARNING:
        kinds = ", ".join(DICTIONARY_LEARNING)
        raise UsageError(f"{path} says dict_class {kind!r}; {kinds} can be loaded")
    check_keys(path, trainer, TRAINER_KEYS)

    # 2. The tensors
    axes = DICTIONARY_LEARNING[kind]
    tensors = read_tensors(weights, load_pickle, axes, ADDED_LATER.get(kind, ()))
    k = trainer.get("k")
    if "k" in tensors:
        k = int(tensors["k"])
        if k != trainer.get("k", k):
            raise UsageError(f"{path} says k {trainer['k']!r}, {weights} {k}")

    # 3. What the kind means
    divides_by_norms = False
    if kind == "AutoEncoder":
        norms = tensors["decoder.weight"].norm(dim=0)
        # the package's own test, with its tolerance
        divides_by_norms = not torch.allclose(norms, torch.ones_like(norms))
    names = {"model_name": trainer.get("lm_name"), "hook_name": trainer.get("submodule_name")}
    provenance = {**texts_of(names), "dictionary_learning": cfg}
    return Foreign(
        tensors=tensors,
        activation="topk" if kind == "AutoEncoderTopK" else "jumprelu",
        k=k,
        threshold=tensors.get("threshold", torch.zeros(1)),
        subtracts_b_dec=kind != "JumpReluAutoEncoder",
        divides_by_norms=divides_by_norms,
        provenance=provenance,
    )


def read_saelens(weights: Path) -> Foreign:
    """Return the SAE in SAELens' sae_weights.safetensors and cfg.json, also of versions before 6.

    Raises as `read_foreign` does.
    """
    # 1. The description: which kind, and nothing that is not known here
    path = weights.with_name("cfg.json")
    cfg = read_description(path)
    is_old = not isinstance(cfg.get("metadata"), dict)
    check_keys(path, cfg, OLD_SAELENS_KEYS if is_old else SAELENS_KEYS)
    kind, k = saelens_kind(path, cfg)
    refuse_saelens_options(path, cfg)

    # 2. The tensors
    tensors = read_tensors(weights, load_file, SAELENS[kind])

    # 3. What the kind means
    metadata = cfg if is_old else cfg["metadata"]
    provenance = texts_of({name: metadata.get(name) for name in ("model_name", "hook_name")})
    is_export_of_ours = isinstance(metadata.get("side"), str)
    if is_export_of_ours:
        provenance |= {key: metadata[key] for key in OURS_EXPORTED if key in metadata}
    provenance["saelens"] = cfg
    return Foreign(
        tensors=tensors,
        activation="topk" if kind == "topk" else "jumprelu",
        k=k if kind == "topk" else None,
        threshold=tensors.get("threshold", torch.zeros(1)),
        subtracts_b_dec=bool(cfg.get("apply_b_dec_to_input", True)),
        divides_by_norms=kind == "topk" and bool(cfg.get("rescale_acts_by_decoder_norm")),
        provenance=provenance,
    )


def saelens_kind(path: Path, cfg: dict[str, Any]) -> tuple[str, int | None]:
    """Return the architecture of an SAE of SAELens, a key of SAELENS, and its k.

    Versions before 6 say "topk" as the activation function of a standard SAE, and k beside it.
    Raises UsageError for another architecture or activation function.
    """
    kind = cfg.get("architecture", "standard")
    k = cfg.get("k")
    function = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    function_options = cfg.get("activation_fn_kwargs") or {}
    check_keys(path, function_options, {"k"})
    if function == "topk":
        return "topk", function_options.get("k")

    loadable = f"of SAELens, {', '.join(SAELENS)} can be loaded"
    if kind not in SAELENS:
        raise UsageError(f"{path} says architecture {kind!r}; {loadable}")
    if function != "relu":
        raise UsageError(f"{path} says activation_fn {function!r}; {loadable}")
    return kind, k


def refuse_saelens_options(path: Path, cfg: dict[str, Any]) -> None:
    """Raise UsageError for an option of SAELens that changes the SAE's input or output."""
    # versions before 6 flatten heads at a hook_z without saying so
    is_old_hook_z = "metadata" not in cfg and "hook_z" in str(cfg.get("hook_name"))
    usual = {
        "reshape_activations": "hook_z" if is_old_hook_z else "none",
        "normalize_activations": "none",
        "finetuning_scaling_factor": False,
    }
    for key, default in usual.items():
        value = cfg.get(key, default)
        if value not in (None, False, "none"):
            raise UsageError(
                f"{path} says {key} {value!r}, which can't be had exactly here; it can't be loaded"
            )


READERS: dict[str, Callable[[Path], Foreign]] = {
    "sae_weights.safetensors": read_saelens,
    "ae.pt": read_dictionary_learning,
}


def texts_of(cfg: dict[str, Any]) -> dict[str, str]:
    """Return the items whose value is a text: {"a": "b", "c": None} gives {"a": "b"}."""
    return {key: value for key, value in cfg.items() if isinstance(value, str)}


def read_description(path: Path) -> dict[str, Any]:
    """Return the JSON object that describes an SAE.

    Raises FileNotFoundError if the file is missing, UsageError if it is no JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; without it nobody can say what the SAE computes"
        )
    return read_json(path)


def read_tensors(
    weights: Path,
    load: Callable[[Path], dict[str, Tensor]],
    axes: Axes,
    optional: Collection[str] = (),
) -> dict[str, Tensor]:
    """Read a file of tensors whose names and shapes are those of `axes`; return them in float32.

    load: reads the file. optional: names that may be missing. Raises UsageError if the file can't
    be read or holds other tensors.
    """
    try:
        tensors = load(weights)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        AttributeError,
    ) as error:
        first_line = str(error).splitlines()[0]
        raise UsageError(f"{weights} is not a readable file of tensors: {first_line}") from None

    expected = {}
    for name, letters in axes.items():
        if name in shapes or name not in optional:
            expected[name] = letters
    if not shapes_fit(shapes, expected):
        wanted = ", ".join(f"{name} ({', '.join(letters)})" for name, letters in expected.items())
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UsageError(f"{weights}: expected {wanted}; got {got}")
    return {name: tensor.float() for name, tensor in tensors.items()}


def shapes_fit(shapes: dict[str, tuple[int, ...]], axes: Axes) -> bool:
    """Return whether there are numbers d, M, ... with which every shape is the one in `axes`.

    {"W_dec": (30, 12), "b_dec": (12,)} fits {"W_dec": "Md", "b_dec": "d"}; with b_dec (13,) it
    does not.
    """
    if shapes.keys() != axes.keys():
        return False
    sizes = {}
    for name, letters in axes.items():
        if len(shapes[name]) != len(letters):
            return False
        for letter, size in zip(letters, shapes[name]):
            if sizes.setdefault(letter, size) != size:
                return False
    return True


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by torch.save; torch refuses whatever else a pickle can do."""
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- writing


def save_saelens(cfg: dict[str, Any], state: dict[str, Tensor], path: str | Path) -> None:
    """Write an SAE of ours in SAELens' format into a folder: the weights, and then `cfg.json`.

    cfg, state: `Sae.cfg` and `Sae.state_dict()`. Raises UsageError for a variant that SAELens does
    not have, and for a folder with another SAE.
    """
    exported, tensors = as_saelens(cfg, state)
    path = Path(path)
    for name in WEIGHTS:
        if name != "sae_weights.safetensors" and (path / name).exists():
            raise UsageError(f"{path} has another SAE in it ({name}); use another folder")
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "sae_weights.safetensors", tensors, {"format": "pt"})
    write_json(path / "cfg.json", exported)


def is_saved_saelens(cfg: dict[str, Any], state: dict[str, Tensor], path: Path) -> bool:
    """Return whether a folder holds exactly what `save_saelens` would write there."""
    exported, tensors = as_saelens(cfg, state)
    if not (path / "cfg.json").exists() or not (path / "sae_weights.safetensors").exists():
        return False
    try:
        theirs = load_file(path / "sae_weights.safetensors")
    except SafetensorError:
        return False
    if theirs.keys() != tensors.keys():
        return False
    for name, tensor in tensors.items():
        if not torch.equal(theirs[name], tensor.cpu()):
            return False
    return read_json(path / "cfg.json") == json.loads(json.dumps(exported))


def as_saelens(
    cfg: dict[str, Any], state: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of an SAE of ours in SAELens' format.

    `sae_lens.SAE.load_from_disk(path)` gives the same codes and x_hat, to rounding. One case is
    different: where a vector has more than 8 k active latents, our batchtopk keeps the 8 k largest
    and SAELens all. Raises UsageError for a variant that SAELens does not have.
    """
    if cfg.get("input_unit_norm"):
        raise UsageError(
            "input_unit_norm can't be exported: SAELens' layer_norm adds 1e-5 to the deviation, "
            "which gives other numbers"
        )
    if cfg["activation"] == "sampletopk":
        raise UsageError(
            "sampletopk can't be exported: SAELens has nothing that shares k among the tokens of a "
            "sample"
        )

    tensors = {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["encoder.bias"],
        "W_dec": state["W_dec"],
        "b_dec": state["b_dec"],
    }
    exported = {
        "architecture": "topk",
        "d_in": cfg["d_in"],
        "d_sae": cfg["num_latents"],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if cfg["activation"] == "topk":
        exported["k"] = cfg["k"]
        exported["rescale_acts_by_decoder_norm"] = False
    else:
        exported["architecture"] = "jumprelu"
        threshold = state["threshold"].float()
        if cfg["activation"] == "batchtopk":
            # ours keeps what reaches the threshold, SAELens what is above it
            one_step_below = torch.nextafter(threshold, torch.tensor(-torch.inf))
            threshold = one_step_below.clamp_min(0)
        tensors["threshold"] = threshold.expand(cfg["num_latents"])

    # the version says which format this is: without it SAELens takes the file for one from before
    # 6.0
    exported["metadata"] = {**cfg, "sae_lens_version": "6.0.0", "sae_lens_training_version": None}
    return exported, {name: tensor.float() for name, tensor in tensors.items()}
