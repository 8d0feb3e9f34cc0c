"""Other packages' SAE files: those of SAELens and dictionary_learning are read here, those of
SAELens written too.

    sae.safetensors         + cfg.json      ours, sparsify, universal-diffsae (sae.py reads them)
    sae_weights.safetensors + cfg.json      SAELens: topk, jumprelu, standard (a ReLU: thresholds of 0)
    ae.pt                   + config.json   dictionary_learning: AutoEncoderTopK, AutoEncoder, JumpReluAutoEncoder, and
                                            BatchTopKSAE, MatryoshkaBatchTopKSAE with their threshold

An SAE is handed around as what our own folder holds: a description (cfg.json) and tensors
(sae.safetensors). All but the TopK ones become "jumprelu"; where the file names no k, k is
num_latents, the most that can be active. Folded into the weights, in float64: SAELens'
rescale_acts_by_decoder_norm; inputs from which b_dec is not subtracted; the decoder norms of
AutoEncoder, which dictionary_learning divides by when it loads one. Refused: gated and other kinds,
normalised inputs, hook_z. SAELens' layer_norm is not our input_unit_norm: it divides by the
deviation of d - 1 degrees of freedom plus 1e-5, and multiplies by it without the 1e-5. Refused too,
in every description, is a key that is not known here and not switched off, since it may change what
the SAE computes.

Written for SAELens: topk stays topk; batchtopk becomes jumprelu, which keeps pre_acts above a
threshold, not those that reach it: one step of float32 below ours. It has no limit on how many
latents of a vector are active, ours has 8 k. sampletopk and input_unit_norm are refused, since
SAELens can't express them.

Checked against sae-lens 6.54, dictionary-learning 0.1 (tests/test_foreign_saes.py).
"""

import json
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from errors import UsageError
from store.disk import read_json, save_tensors, write_json

WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "ae.pt")
ARRAYS = {
    "W_enc": "dM",
    "b_enc": "M",
    "W_dec": "Md",
    "b_dec": "d",
}  # axes: d input width, M latents
LAYERS = {"encoder.weight": "Md", "encoder.bias": "M", "decoder.weight": "dM"}
TOPK = {"k": "", "threshold": ""}
LATER = {
    "AutoEncoderTopK": {"k", "threshold"},
    "BatchTopKSAE": {"k"},
}  # tensors that files of earlier versions do not have
SAELENS = {"topk": ARRAYS, "standard": ARRAYS, "jumprelu": ARRAYS | {"threshold": "M"}}
DICTIONARY_LEARNING = {
    "AutoEncoder": LAYERS | {"bias": "d"},
    "AutoEncoderTopK": LAYERS | {"b_dec": "d"} | TOPK,
    "BatchTopKSAE": LAYERS | {"b_dec": "d"} | TOPK,
    "MatryoshkaBatchTopKSAE": ARRAYS | TOPK | {"group_sizes": "G"},
    "JumpReluAutoEncoder": ARRAYS | {"threshold": "M"},
}

# Keys of a description that say how the SAE was trained, what it was trained on, or what is looked
# at elsewhere in this project. Keys of sparsify (and universal-diffsae), then those of ours. What
# train.py wrote has a digest of its data besides.
OURS_EXPORTED = (
    "side",
    "stream",
    "rows",
    "fingerprint",
    "model_dtype",
    "collections",
    "collected_with",
)
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
SPARSIFY_KEYS = {
    "activation",
    "expansion_factor",
    "normalize_decoder",
    "num_latents",
    "k",
    "multi_topk",
    "d_in",
}
OUR_KEYS = set(
    """
    always_on by_timestep collected_with collections cosine data data_relative_to dead dictionary_learning explained_variance
    fingerprint fvu held_out_whole_prompts hook_name input_unit_norm l0 model_dtype model_name num_held_out num_training
    num_training_in_data num_training_prompts rows saelens sae_fingerprint side stream tokens_per_sample
    training
    """.split()
)
SAELENS_KEYS = set(
    """
    apply_b_dec_to_input architecture d_in d_sae device dtype k metadata normalize_activations rescale_acts_by_decoder_norm
    reshape_activations
    """.split()
)
# SAELens before version 6, when training options stood beside the others
OLD_SAELENS_KEYS = SAELENS_KEYS | set(
    """
    act_store_device activation_fn activation_fn_kwargs activation_fn_str adam_beta1 adam_beta2 autocast autocast_lm
    b_dec_init_method cached_activations_path checkpoint_path compile_llm compile_sae context_size dataset_path
    dataset_trust_remote_code dead_feature_threshold dead_feature_window decoder_heuristic_init decoder_orthogonal_init
    eval_batch_size_prompts eval_every_n_wandb_logs expansion_factor feature_sampling_window finetuning_method
    finetuning_scaling_factor finetuning_tokens from_pretrained_path hook_eval hook_head_index hook_layer hook_name hook_point
    hook_point_head_index hook_point_layer init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold l1_coefficient l1_warm_up_steps log_activations_store_to_wandb log_optimizer_state_to_wandb
    log_to_wandb lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps model_class_name
    model_from_pretrained_kwargs model_kwargs model_name mse_loss_normalization n_batches_in_buffer n_checkpoints
    n_eval_batches n_restart_cycles neuronpedia_id noise_alpha normalize_sae_decoder prefer_float_from_disk prepend_bos resume
    run_name sae_lens_training_version sae_lens_version scale_sparsity_penalty_by_decoder_norm seed seqpos_slice
    store_batch_size store_batch_size_prompts streaming tokens_per_buffer train_batch_size train_batch_size_tokens
    training_tokens use_cached_activations use_ghost_grads verbose wandb_entity wandb_id wandb_log_frequency wandb_project
    """.split()
)
# dictionary_learning
TRAINER_KEYS = set(
    """
    activation_dim anneal_end anneal_start auxk_alpha bandwidth decay_start device dict_class dict_size group_fractions
    group_sizes group_weights initial_sparsity_penalty k l1_penalty layer lm_name lr n_sparsity_updates norm_factor p_end
    p_start resample_steps seed sparsity_function sparsity_loss sparsity_penalty sparsity_queue_length sparsity_warmup_steps
    steps submodule_name target_l0 threshold_beta threshold_start_step top_k_aux trainer_class wandb_name warmup_steps
    """.split()
)


def find_weights(path):
    """The file with the weights of an SAE folder; `path` is the folder or that file itself.

    Raises FileNotFoundError where there is none, ValueError where there are several, or the file is
    of no known name.
    """
    path = Path(path)
    if path.is_file():
        if path.name not in WEIGHTS:
            raise UsageError(f"{path}: expected an SAE folder, or in it {', '.join(WEIGHTS)}")
        return path
    found = [path / name for name in WEIGHTS if (path / name).exists()]
    if not found:
        raise FileNotFoundError(f"{path} is no SAE folder: it has none of {', '.join(WEIGHTS)}")
    if len(found) > 1:
        raise UsageError(
            f"{path} has {' and '.join(file.name for file in found)}; name the one that is meant"
        )
    return found[0]


def check_keys(path, cfg, known):
    """Raise UsageError for a key of a description that is not known and says anything: it may
    change what is computed."""
    for key, value in cfg.items():
        says_nothing = value in (None, "none", "", [], {}) or value is False and key in OFF_IS_USUAL
        if key not in known and not says_nothing:
            raise UsageError(
                f"{path} says {key} {repr(value)[:60]}, which is not known here and may change what the SAE computes; "
                "it can't be loaded. If it changes nothing, remove it from a copy of the file"
            )


def read_foreign(weights):
    """SAELens' or dictionary_learning's file of weights, and the description beside it -> cfg and
    tensors as in our files.

    Raises UsageError for what can't be read or would be approximated, OSError where the description
    is not there.
    """
    read = read_dictionary_learning if weights.name == "ae.pt" else read_saelens
    tensors, activation, k, threshold, centred, unit_norm, provenance = read(weights)
    linear = "encoder.weight" in tensors
    W_enc = (tensors["encoder.weight"] if linear else tensors["W_enc"].T).double()  # (M, d)
    W_dec = (tensors["decoder.weight"].T if linear else tensors["W_dec"]).double()  # (M, d)
    b_enc = tensors["encoder.bias" if linear else "b_enc"].double()  # (M,)
    b_dec = tensors["bias" if "bias" in tensors else "b_dec"].double()  # (d,)
    if unit_norm:
        norms = W_dec.norm(dim=1, keepdim=True)  # (M, 1)
        W_enc, b_enc = W_enc * norms, b_enc * norms[:, 0]
        W_dec = W_dec / norms.clamp_min(torch.finfo(torch.float32).tiny)
    if not centred:
        b_enc = b_enc + W_enc @ b_dec
    state = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    M, d = W_dec.shape
    if activation == "jumprelu":
        state["threshold"], k = threshold.expand(M), k or M
    return {**provenance, "activation": activation, "k": k, "d_in": d}, {
        name: t.float() for name, t in state.items()
    }


class Foreign(NamedTuple):
    """What a file of another package holds."""

    tensors: dict
    """{the package's own name: float32 tensor}"""

    activation: str
    """As in ours."""

    k: int | None
    """Active latents; None where the file does not say."""

    threshold: torch.Tensor
    """(1,), () or (M,): pre_acts above it stay; for topk of no meaning."""

    centred: bool
    """Whether b_dec is subtracted from the input."""

    unit_norm: bool
    """Whether the decoder's norms are divided out of it, and multiplied into the encoder."""

    provenance: dict
    """What our cfg.json is to say of where it comes from."""


def read_saelens(weights):
    """The Foreign of SAELens' sae_weights.safetensors and cfg.json, also those of versions before
    6; raises as read_foreign."""
    path = weights.with_name("cfg.json")
    cfg = read_description(path)
    is_old = not isinstance(cfg.get("metadata"), dict)
    check_keys(path, cfg, OLD_SAELENS_KEYS if is_old else SAELENS_KEYS)
    check_keys(path, cfg.get("activation_fn_kwargs") or {}, {"k"})
    kind, function = (
        cfg.get("architecture", "standard"),
        cfg.get("activation_fn", cfg.get("activation_fn_str", "relu")),
    )
    k, metadata = cfg.get("k"), cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else cfg
    if function == "topk":  # before version 6
        kind, function, k = "topk", "relu", (cfg.get("activation_fn_kwargs") or {}).get("k")
    if kind not in SAELENS or function != "relu":
        said = f"architecture {kind!r}" if kind not in SAELENS else f"activation_fn {function!r}"
        raise UsageError(f"{path} says {said}; of SAELens, {', '.join(SAELENS)} can be loaded")
    hook_z = "hook_z" if "metadata" not in cfg and "hook_z" in str(cfg.get("hook_name")) else "none"
    fixed = {
        "reshape_activations": hook_z,
        "normalize_activations": "none",
        "finetuning_scaling_factor": False,
    }
    for key, default in fixed.items():
        value = cfg.get(key, default)
        if value not in (None, False, "none"):
            raise UsageError(
                f"{path} says {key} {value!r}, which can't be had exactly here; it can't be loaded"
            )
    rescale = kind == "topk" and bool(cfg.get("rescale_acts_by_decoder_norm"))
    tensors = read_tensors(weights, load_file, SAELENS[kind])
    threshold = tensors.get("threshold", torch.zeros(1))
    provenance = {
        key: metadata[key]
        for key in ("model_name", "hook_name")
        if isinstance(metadata.get(key), str)
    }
    if isinstance(metadata.get("side"), str):  # an export of ours
        provenance |= {key: metadata[key] for key in OURS_EXPORTED if key in metadata}
    centred, provenance["saelens"] = bool(cfg.get("apply_b_dec_to_input", True)), cfg
    activation, k = ("topk", k) if kind == "topk" else ("jumprelu", None)
    return Foreign(tensors, activation, k, threshold, centred, rescale, provenance)


def read_dictionary_learning(weights):
    """The Foreign of dictionary_learning's ae.pt and config.json; raises as read_foreign."""
    path = weights.with_name("config.json")
    cfg = read_description(path)
    trainer = cfg.get("trainer") if isinstance(cfg.get("trainer"), dict) else {}
    check_keys(path, cfg, {"trainer", "buffer"})
    kind = trainer.get("dict_class")
    if kind not in DICTIONARY_LEARNING:
        raise UsageError(
            f"{path} says dict_class {kind!r}; {', '.join(DICTIONARY_LEARNING)} can be loaded"
        )
    check_keys(path, trainer, TRAINER_KEYS)
    tensors = read_tensors(weights, load_pickle, DICTIONARY_LEARNING[kind], LATER.get(kind, set()))
    k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
    if k != trainer.get("k", k):
        raise UsageError(f"{path} says k {trainer['k']!r}, {weights} {k}")
    threshold = tensors.get("threshold", torch.zeros(1))
    norms = tensors["decoder.weight"].norm(dim=0) if kind == "AutoEncoder" else torch.ones(1)
    unit_norm = not torch.allclose(
        norms, torch.ones_like(norms)
    )  # the package's own test, with its tolerance
    activation = "topk" if kind == "AutoEncoderTopK" else "jumprelu"
    names = {"model_name": trainer.get("lm_name"), "hook_name": trainer.get("submodule_name")}
    provenance = {key: value for key, value in names.items() if isinstance(value, str)} | {
        "dictionary_learning": cfg
    }
    return Foreign(
        tensors, activation, k, threshold, kind != "JumpReluAutoEncoder", unit_norm, provenance
    )


def read_description(path):
    """A JSON object; OSError where the file is not there, ValueError if it is no JSON object."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; without it nobody can say what the SAE computes"
        )
    return read_json(path)


def read_tensors(weights, load, axes, optional=frozenset()):
    """{name: float32 tensor} of a file, whose names and shapes are to fit `axes` {name: one letter
    an axis}.

    optional: names that may be missing.
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
        raise UsageError(
            f"{weights} is not a readable file of tensors: {str(error).splitlines()[0]}"
        ) from None
    axes = {
        name: letters for name, letters in axes.items() if name in shapes or name not in optional
    }
    sizes = {}
    fits = shapes.keys() == axes.keys() and all(
        len(shapes[name]) == len(letters)
        and all(sizes.setdefault(a, n) == n for a, n in zip(letters, shapes[name]))
        for name, letters in axes.items()
    )
    if not fits:
        expected = ", ".join(f"{name} ({', '.join(letters)})" for name, letters in axes.items())
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UsageError(f"{weights}: expected {expected}; got {got}")
    return {name: tensor.float() for name, tensor in tensors.items()}


def load_pickle(path):
    """The tensors of a file by torch.save; whatever else a pickle can do is refused by torch."""
    return torch.load(path, map_location="cpu", weights_only=True)


def save_saelens(cfg, state, path):
    """Write an SAE of ours in SAELens' format: `cfg.json` and `sae_weights.safetensors` in the
    folder `path`, the former last.

    cfg, state: as in our own files (`Sae.cfg`, `Sae.state_dict()`). Raises UsageError for a variant
    that SAELens has not, and for a folder with another SAE.
    """
    exported, tensors = as_saelens(cfg, state)
    path = Path(path)
    others = [
        name for name in WEIGHTS if name != "sae_weights.safetensors" and (path / name).exists()
    ]
    if others:
        raise UsageError(f"{path} has another SAE in it ({others[0]}); use another folder")
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(path / "sae_weights.safetensors", tensors, {"format": "pt"})
    write_json(path / "cfg.json", exported)


def is_saved_saelens(cfg, state, path):
    """Whether the folder `path` holds just what `save_saelens` would write there."""
    exported, tensors = as_saelens(cfg, state)
    if not (path / "cfg.json").exists() or not (path / "sae_weights.safetensors").exists():
        return False
    try:
        theirs = load_file(path / "sae_weights.safetensors")
    except SafetensorError:
        return False
    same = theirs.keys() == tensors.keys() and all(
        torch.equal(theirs[name], tensors[name].cpu()) for name in tensors
    )
    return same and read_json(path / "cfg.json") == json.loads(json.dumps(exported))


def as_saelens(cfg, state):
    """The description and the tensors of SAELens' format. `sae_lens.SAE.load_from_disk(path)` gives
    the same codes and x_hat, to rounding; of a batchtopk also where a vector has more than 8 k
    active latents, of which ours keeps the 8 k largest and SAELens all. Raises UsageError for a
    variant that SAELens has not.
    """
    if cfg.get("input_unit_norm"):
        raise UsageError(
            "input_unit_norm can't be exported: SAELens' layer_norm adds 1e-5 to the deviation, other numbers"
        )
    if cfg["activation"] == "sampletopk":
        raise UsageError(
            "sampletopk can't be exported: SAELens has nothing that shares k out over the tokens of a sample"
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
        if (
            cfg["activation"] == "batchtopk"
        ):  # ours keeps what reaches the threshold, SAELens what is above it
            just_below = torch.nextafter(threshold, torch.tensor(-torch.inf))
            threshold = just_below.clamp_min(0)
        tensors["threshold"] = threshold.expand(cfg["num_latents"])
    # the version says which format this is: without it SAELens takes the file for one older than
    # 6.0
    exported["metadata"] = {**cfg, "sae_lens_version": "6.0.0", "sae_lens_training_version": None}

    return exported, {name: tensor.float() for name, tensor in tensors.items()}
