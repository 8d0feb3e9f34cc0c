"""export.py as a user calls it, on this disk; what it pushes is in test_hub.py."""

import sys

import pytest
from test_foreign_saes import X, assert_same, dense
from test_sae import make_sae

import export
from sae import Sae


def run_script(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["export.py", *args])
    export.run_script(export.main, export.Config)


def test_the_script(tmp_path, monkeypatch, capsys):
    """export.py writes the SAE; contradictory options and what can't be exported end in one line."""
    monkeypatch.chdir(tmp_path)
    make_sae().save_to_disk("saes/mine")
    run_script(monkeypatch, "--export", "saelens")
    assert "exported/mine/: cfg.json, sae_weights.safetensors" in capsys.readouterr().out
    assert_same(dense(Sae.load_from_disk("exported/mine"), X), dense(make_sae(), X))
    run_script(monkeypatch, "--export", "saelens")  # again: the same
    make_sae(k=5).save_to_disk("saes/other")
    make_sae(cfg=dict(activation="sampletopk")).save_to_disk("saes/shared")
    for args, message in (
        (
            ["--sae", "saes/other", "--export", "saelens", "--out_dir", "exported/mine"],
            "mine is there already, with another SAE",
        ),
        (["--sae", "saes/mine"], "nothing to do"),
        (["--sae", "saes/mine", "--to_hub", "a/b", "--out_dir", "x"], "--out_dir x"),
        (["--activations", "acts"], "--activations acts: expected --to_hub"),
        (["--activations", "acts", "--sae", "saes/mine", "--to_hub", "a/b"], "without --sae"),
        (
            ["--sae", "saes", "--export", "saelens"],
            "saes has several SAEs, mine, other, shared; name one",
        ),
        (["--sae", "saes/none", "--export", "saelens"], "saes/none is no SAE folder"),
        (["--sae", "saes/shared", "--export", "saelens"], "sampletopk can't be exported"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_script(monkeypatch, *args)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message in error
        assert error.count("\n") == 1
