"""Other packages' files: folders written by hand against the formulas in float64, and against the
packages themselves."""

import json

import pytest
import torch
from files import read_json
from test_sae import VARIANTS, X, make_sae

import export as export_script
from errors import UsageError
from hook import HookPoint
from sae import Sae
from store.disk import save_tensors
from store.foreign_saes import save_saelens

D = 12
M = 30
K = 4
BENCH = "is not installed: pip install -r requirements-bench.txt"


def export(sae, path):
    save_saelens(sae.cfg, sae.state_dict(), path)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def dense(sae, x):
    """codes (N, M) and x_hat of one of ours."""
    codes = sae.encode(x)
    return torch.zeros(len(x), sae.num_latents).scatter(
        1, codes.top_indices, codes.top_acts
    ), sae.decode(*codes)


def arrays():
    W_dec = draw(M, D) / 3
    return {
        "W_enc": W_dec.T + draw(D, M) / 5,
        "b_enc": draw(M) / 2,
        "W_dec": W_dec,
        "b_dec": draw(D) + 3,
    }


def save_saelens_by_hand(folder, architecture, old=False, **cfg):
    tensors = arrays() | ({"threshold": draw(M, seed=1)} if architecture == "jumprelu" else {})
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "sae_weights.safetensors", tensors, {})
    cfg = {"architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32"} | cfg
    if architecture == "topk":
        cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}} if old else {"k": K}
    if old:
        cfg = {
            key: value for key, value in cfg.items() if key != "architecture" or value == "jumprelu"
        }
        cfg |= {"hook_name": "blocks.1", "normalize_activations": False, "scaling_factor": None}
    else:
        cfg |= {"metadata": {"sae_lens_version": "6.54.0", "hook_name": "blocks.1"}}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return {name: tensor.double() for name, tensor in tensors.items()}


def saelens_reference(
    t, x, architecture, apply_b_dec_to_input=True, rescale_acts_by_decoder_norm=False, old=False
):
    norms = (
        t["W_dec"].norm(dim=1)
        if rescale_acts_by_decoder_norm
        else torch.ones(M, dtype=torch.float64)
    )
    pre = ((x - t["b_dec"] * apply_b_dec_to_input) @ t["W_enc"] + t["b_enc"]) * norms
    codes = torch.relu(pre)
    if architecture == "topk":
        codes = codes * (pre >= pre.topk(K).values[:, -1:])
    if architecture == "jumprelu":
        codes = codes * (pre > t["threshold"])
    return codes, codes / norms @ t["W_dec"] + t["b_dec"]


SAELENS = [
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}),
    ("topk", {"old": True}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("jumprelu", {"old": True}),
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"old": True}),
]


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-5)
    assert torch.equal(mine[0] > 0, theirs[0] > 0)


@pytest.mark.parametrize("architecture, cfg", SAELENS)
def test_saelens_folders(tmp_path, architecture, cfg):
    """Codes and reconstructions are those of SAELens' definitions, for every architecture."""
    tensors = save_saelens_by_hand(tmp_path, architecture, **cfg)
    sae = Sae.load_from_disk(tmp_path)
    codes, x_hat = saelens_reference(tensors, X.double(), architecture, **cfg)
    assert 0 < (codes > 0).sum() < codes.numel()
    assert_same(dense(sae, X), (codes, x_hat))
    assert sae.k == (K if architecture == "topk" else M)
    assert sae.cfg["hook_name"] == "blocks.1"


@pytest.mark.parametrize("architecture, cfg", SAELENS)
def test_saelens_itself_reads_them_so(tmp_path, architecture, cfg):
    sae_lens = pytest.importorskip("sae_lens", reason=f"sae-lens {BENCH}")
    save_saelens_by_hand(tmp_path, architecture, **cfg)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        codes = theirs.encode(X)
        assert_same(dense(Sae.load_from_disk(tmp_path), X), (codes, theirs.decode(codes)))


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "JumpReLU", "Standard"])
def test_we_read_what_saelens_saves_after_training(tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens", reason=f"sae-lens {BENCH}")
    cfg = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=D, d_sae=M, **({"k": K} if "TopK" in kind else {})
    )
    theirs = getattr(sae_lens, f"{kind}TrainingSAE")(cfg)
    with torch.no_grad():
        for parameter, (_, tensor) in zip(
            (theirs.W_enc, theirs.b_enc, theirs.W_dec, theirs.b_dec), arrays().items()
        ):
            parameter.copy_(tensor)
        if kind == "BatchTopK":
            theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path)
    inference = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        codes = inference.encode(X)
        assert_same(dense(Sae.load_from_disk(tmp_path), X), (codes, inference.decode(codes)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"architecture": "jumprelu"}, r"expected .*threshold \(M\); got"),
        ({"k": None}, "k is None"),
        ({"k": 31}, "k is 31"),
    ],
    ids=str,
)
def test_saelens_folders_that_are_refused(tmp_path, change, message):
    save_saelens_by_hand(tmp_path, "topk")
    cfg = read_json(tmp_path / "cfg.json")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(ValueError, match=message):
        Sae.load_from_disk(tmp_path)


EXPORTS = [dict(), dict(activation="batchtopk")]


def sae_to_export(cfg):
    sae = make_sae(cfg=cfg)
    sae.cfg |= {"hook_name": "up_blocks.1", "fvu": 0.25}
    # one activation is the threshold itself, so that >= and > differ
    if sae.activation == "batchtopk":
        acts = sae.encode(X).top_acts
        sae.threshold.copy_(acts[acts > 0].sort().values[-90])
    return sae


@pytest.mark.parametrize("cfg", EXPORTS, ids=str)
def test_an_export_comes_back(tmp_path, cfg):
    sae = sae_to_export(cfg)
    export(sae, tmp_path)
    again = Sae.load_from_disk(tmp_path)
    assert_same(dense(again, X), dense(sae, X))
    assert again.cfg["hook_name"] == "up_blocks.1"
    assert again.cfg["saelens"]["metadata"]["fvu"] == 0.25
    if cfg:
        assert again.activation == "jumprelu"
        assert (dense(sae, X)[0] == sae.threshold).sum() == 1
        export(again, tmp_path / "twice")
        assert_same(dense(Sae.load_from_disk(tmp_path / "twice"), X), dense(sae, X))


@pytest.mark.parametrize("cfg", EXPORTS, ids=str)
def test_saelens_itself_reads_an_export(tmp_path, cfg):
    sae_lens = pytest.importorskip("sae_lens", reason=f"sae-lens {BENCH}")
    sae = sae_to_export(cfg)
    export(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        codes = theirs.encode(X)
        assert_same(dense(sae, X), (codes, theirs.decode(codes)))
    assert theirs.cfg.architecture() == ("jumprelu" if cfg else "topk")
    assert theirs.cfg.metadata.hook_name == "up_blocks.1"
    assert theirs.cfg.metadata.fvu == 0.25


def test_saelens_layer_norm_is_not_our_unit_norm(tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason=f"sae-lens {BENCH}")
    save_saelens_by_hand(tmp_path, "topk", normalize_activations="layer_norm")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    x = X.double()
    z = theirs.to(dtype=torch.float64).run_time_activation_norm_fn_in(x)
    mine, _, std = make_sae(cfg=dict(input_unit_norm=True)).standardize(x)
    c = (D - 1) ** 0.5 / D**0.5
    torch.testing.assert_close(z, c * mine / (1 + 1e-5 * c / std), rtol=1e-12, atol=0)
    # so no factor in the weights makes up for it to float32's rounding
    assert ((z - c * mine) / mine).abs().max() > 2e-6


def test_exports_that_are_refused(tmp_path):
    for cfg, message in (
        (dict(activation="sampletopk"), "sampletopk can't"),
        (dict(input_unit_norm=True), "input_unit_norm can't"),
    ):
        with pytest.raises(ValueError, match=message):
            export(make_sae(cfg=cfg), tmp_path / "new")
    make_sae().save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="another SAE"):
        export(make_sae(), tmp_path)
    assert not (tmp_path / "new").exists()
    assert Sae.load_from_disk(tmp_path).k == 4


DICTIONARIES = [
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "unset BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "AutoEncoder",
]
DICTIONARIES += ["unit AutoEncoder", "JumpReluAutoEncoder"]


def save_dictionary_by_hand(folder, kind):
    """ae.pt and config.json as dictionary_learning's trainSAE writes them."""
    t = arrays()
    threshold = -1.0 if kind.startswith("unset") else 0.7
    if kind.startswith("unit"):
        t["W_dec"] = t["W_dec"] / t["W_dec"].norm(dim=1, keepdim=True)
    kind = kind.split()[-1]
    topk = (
        {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
        if "TopK" in kind
        else {}
    )
    layers = {
        "encoder.weight": t["W_enc"].T,
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T,
    }
    state = {
        "AutoEncoder": layers | {"bias": t["b_dec"]},
        "JumpReluAutoEncoder": t | {"threshold": draw(M, seed=1)},
        "MatryoshkaBatchTopKSAE": t | topk | {"group_sizes": torch.tensor([10, 20])},
    }.get(kind, layers | {"b_dec": t["b_dec"]} | topk)
    trainer = {
        "dict_class": kind,
        "activation_dim": D,
        "dict_size": M,
        "submodule_name": "blocks.1",
    } | ({"k": K} if topk else {})
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return {name: tensor.double() for name, tensor in {**t, **state}.items()}


def dictionary_reference(t, x, kind):
    norms = (
        t["W_dec"].norm(dim=1)
        if kind.endswith("AutoEncoder") and "Jump" not in kind
        else torch.ones(M).double()
    )
    pre = ((x - t["b_dec"] * ("Jump" not in kind)) @ t["W_enc"] + t["b_enc"]) * norms
    codes = torch.relu(pre)
    if kind == "AutoEncoderTopK":
        codes = codes * (pre >= pre.topk(K).values[:, -1:])
    elif "threshold" in t:
        codes = codes * (pre > t["threshold"])
    return codes, codes / norms @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning_folders(tmp_path, kind):
    """Codes and reconstructions are those of dictionary_learning's definitions, for every class."""
    tensors = save_dictionary_by_hand(tmp_path, kind)
    sae = Sae.load_from_disk(tmp_path)
    codes, x_hat = dictionary_reference(tensors, X.double(), kind)
    assert 0 < (codes > 0).sum() < codes.numel()
    assert_same(dense(sae, X), (codes, x_hat))
    assert sae.k == (K if "TopK" in kind else M)
    assert sae.cfg["hook_name"] == "blocks.1"
    sae.save_to_disk(tmp_path / "ours")
    assert torch.equal(Sae.load_from_disk(tmp_path / "ours")(X), sae(X))


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning_itself_reads_them_so(tmp_path, kind):
    utils = pytest.importorskip("dictionary_learning.utils", reason=f"dictionary-learning {BENCH}")
    save_dictionary_by_hand(tmp_path, kind)
    torch.manual_seed(0)
    theirs, _ = utils.load_dictionary(str(tmp_path), "cpu")
    with torch.no_grad():
        codes = theirs.encode(X)
        assert_same(dense(Sae.load_from_disk(tmp_path), X), (codes, theirs.decode(codes)))


def test_dictionary_learning_folders_that_are_refused(tmp_path):
    save_dictionary_by_hand(tmp_path, "AutoEncoderTopK")
    config = read_json(tmp_path / "config.json")
    for change, message in (
        ({"dict_class": "GatedAutoEncoder"}, "GatedAutoEncoder"),
        ({"dict_class": "AutoEncoder"}, "expected encoder.weight .*bias"),
        ({"k": 5}, "says k 5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"trainer": config["trainer"] | change}))
        with pytest.raises(ValueError, match=message):
            Sae.load_from_disk(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        Sae.load_from_disk(tmp_path)


class Trap:
    """Runs `print` when it is unpickled by anything but weights_only=True."""

    def __reduce__(self):
        return print, ("the trap has sprung",)


@pytest.mark.parametrize("content", ["trap", "list", "cut"])
def test_a_pickle_is_read_as_tensors_and_nothing_else(tmp_path, content, capfd):
    save_dictionary_by_hand(tmp_path, "AutoEncoder")
    if content == "cut":
        (tmp_path / "ae.pt").write_bytes((tmp_path / "ae.pt").read_bytes()[:500])
    else:
        torch.save({"bias": Trap()} if content == "trap" else [torch.ones(3)], tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="not a readable file of tensors"):
        Sae.load_from_disk(tmp_path)
    assert "trap" not in capfd.readouterr().out


def test_the_files_of_a_folder_decide(tmp_path):
    with pytest.raises(FileNotFoundError, match="has none of"):
        Sae.load_from_disk(tmp_path)
    save_dictionary_by_hand(tmp_path, "AutoEncoder")
    make_sae().save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="sae.safetensors and ae.pt"):
        Sae.load_from_disk(tmp_path)
    assert Sae.load_from_disk(tmp_path / "sae.safetensors").activation == "topk"
    assert Sae.load_from_disk(tmp_path / "ae.pt").activation == "jumprelu"
    with pytest.raises(ValueError, match="expected an SAE folder"):
        Sae.load_from_disk(tmp_path / "cfg.json")


@pytest.mark.parametrize(
    "cfg",
    [*VARIANTS, dict(activation="batchtopk", input_unit_norm=True), dict(activation="jumprelu")],
    ids=str,
)
def test_sparsify_refuses_the_variants(tmp_path, cfg, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # without it sparsify wants a GPU
    sparsify = pytest.importorskip("sparsify", reason=f"eai-sparsify {BENCH}")
    make_sae(cfg=cfg).save_to_disk(tmp_path)
    with pytest.raises(Exception, match=make_sae(cfg=cfg).cfg["activation"]):
        sparsify.SparseCoder.load_from_disk(tmp_path)


def test_load_many(tmp_path):
    """Every SAE below a folder is loaded, by its hook_name; pickled ones are passed over."""
    with pytest.raises(ValueError, match="has no SAE"):
        Sae.load_many(tmp_path)
    for run in ("a/one", "a/two", "b"):
        sae = make_sae()
        sae.cfg["hook_name"] = f"hook {run}"
        sae.save_to_disk(tmp_path / run)
    (tmp_path / "pickled").mkdir()
    save_dictionary_by_hand(tmp_path / "pickled", "AutoEncoder")
    assert list(Sae.load_many(tmp_path)) == ["hook a/one", "hook a/two", "hook b"]
    save_saelens_by_hand(tmp_path / "c", "jumprelu")
    assert list(Sae.load_many(tmp_path, "[bc]")) == ["hook b", "blocks.1"]
    make_sae().save_to_disk(tmp_path / "b")  # without a hook name
    assert list(Sae.load_many(tmp_path)) == ["a/one", "a/two", "b", "c"]
    assert Sae.load_many(tmp_path)["c"].activation == "jumprelu"
    with pytest.raises(ValueError, match="'x', only in a/one, a/two, b, c"):
        Sae.load_many(tmp_path, "x")


def change_json(path, change):
    path.write_text(json.dumps(read_json(path) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"signed": True},
        {"jumprelu": 0.1},
        {"abs_topk": True},
        {"dataset_norm": 3.5},
        {"normalize_input": "layer_norm"},
        {"W_skip": 1},
        {"training": {"signed": True}, "pre_bias": -1.0},
    ],
    ids=str,
)
def test_a_sparsify_folder_with_an_unknown_key_is_refused(tmp_path, change):
    Sae(12, 30, 4).save_to_disk(tmp_path)
    change_json(tmp_path / "cfg.json", change)
    with pytest.raises(UsageError, match=f"cfg.json says {list(change)[-1]}.* can't be loaded"):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize("key", ["apply_b_dec_to_input", "use_relu", "encoder_bias"])
def test_a_key_that_is_off_may_change_the_meaning(tmp_path, key):
    Sae(12, 30, 4).save_to_disk(tmp_path)
    change_json(tmp_path / "cfg.json", {key: False})
    with pytest.raises(UsageError, match=f"says {key} False"):
        Sae.load_from_disk(tmp_path)


def test_an_export_for_saelens_comes_back_with_its_hook_point(tmp_path):
    site = {
        "hook_name": "mid_block",
        "side": "diff",
        "stream": "image",
        "rows": "uncond",
        "fingerprint": "a-b",
    }
    Sae(12, 30, 4, site | {"model_name": "toy"}).save_to_disk(tmp_path / "sae")
    export_script.main(
        export_script.Config(
            sae=str(tmp_path / "sae"), export="saelens", out_dir=str(tmp_path / "exported")
        )
    )
    sae = Sae.load_from_disk(tmp_path / "exported")
    assert sae.hook_point == HookPoint("mid_block", "diff", "image", "uncond")
    assert sae.cfg["fingerprint"] == "a-b"


def test_what_changes_nothing_is_loaded(tmp_path):
    Sae(12, 30, 4).save_to_disk(tmp_path)
    off = {
        "signed": False,
        "jumprelu": None,
        "transcode": False,
        "multi_topk": True,
        "expansion_factor": 32,
        "some_list": [],
    }
    change_json(tmp_path / "cfg.json", off)
    assert Sae.load_from_disk(tmp_path).k == 4
    # of train.py
    change_json(tmp_path / "cfg.json", {"training": {"digest": "0"}, "of_another_version": 1})
    assert Sae.load_from_disk(tmp_path).k == 4
    change_json(tmp_path / "cfg.json", {"num_latents": 31})
    with pytest.raises(UsageError, match="expected encoder.weight"):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    "old, change, name",
    [
        (False, {"use_error_term_bias": 1.5}, "use_error_term_bias"),
        (False, {"signed": True}, "signed"),
        (True, {"signed": True}, "signed"),
        (True, {"activation_fn_kwargs": {"k": 4, "signed": True}}, "signed"),
        (True, {"input_scale": 2.0}, "input_scale"),
    ],
    ids=str,
)
def test_a_saelens_folder_with_an_unknown_key_is_refused(tmp_path, old, change, name):
    save_saelens_by_hand(tmp_path, "topk", old=old)
    assert Sae.load_from_disk(tmp_path).k == 4
    change_json(tmp_path / "cfg.json", change)
    with pytest.raises(UsageError, match=f"says {name} "):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize("where", ["config", "trainer"])
def test_a_dictionary_learning_folder_with_an_unknown_key_is_refused(tmp_path, where):
    save_dictionary_by_hand(tmp_path, "AutoEncoderTopK")
    config = read_json(tmp_path / "config.json")
    (config if where == "config" else config["trainer"])["dataset_norm"] = 3.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="config.json says dataset_norm 3.5"):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    "kind, missing",
    [
        ("AutoEncoderTopK", ["k", "threshold"]),
        ("AutoEncoderTopK", ["threshold"]),
        ("BatchTopKSAE", ["k"]),
    ],
)
def test_old_dictionary_learning_files_have_k_in_their_config(tmp_path, kind, missing):
    save_dictionary_by_hand(tmp_path, kind)
    expected = Sae.load_from_disk(tmp_path)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    torch.save(
        {name: tensor for name, tensor in state.items() if name not in missing}, tmp_path / "ae.pt"
    )
    sae = Sae.load_from_disk(tmp_path)
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0)) + 3
    assert sae.k == expected.k == 4
    assert torch.equal(sae(x), expected(x))
    if kind == "AutoEncoderTopK":
        config = read_json(tmp_path / "config.json")
        del config["trainer"]["k"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(
            {name: tensor for name, tensor in state.items() if name != "k"}, tmp_path / "ae.pt"
        )
        with pytest.raises(UsageError, match="k is None"):
            Sae.load_from_disk(tmp_path)
