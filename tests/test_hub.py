"""The Hub: huggingface_hub itself against a stand-in on loopback that speaks the few requests this
takes."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from commands import run_fresh
from test_sae import X, make_sae

import export
from sae import Sae
from store import hub


class StandIn(BaseHTTPRequestHandler):
    """Repositories in memory: `server.repos["models/me/x"]` is {path: bytes}."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repo(self, parts):
        """Of ["models", "me", "x", ...]: its files and its commit; ends the request with 404 where
        there is none."""
        files = self.server.repos.get("/".join(parts[:3]))
        if files is None:
            self.answer(404, X_Error_Code="RepoNotFound")
            return None, None
        return files, hashlib.sha1(
            b"".join(k.encode() + v for k, v in sorted(files.items()))
        ).hexdigest()

    def do_POST(self):
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")[1:]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer(401, {"error": "Invalid username or password."})
        if parts == ["repos", "create"]:
            request = json.loads(body)
            owner = request.get("organization") or "me"
            name = f"{request.get('type') or 'model'}s/{owner}/{request['name']}"
            exists = name in self.server.repos
            _ = self.server.repos.setdefault(name, {})
            self.server.private.setdefault(
                name, request.get("visibility") == "private" or request.get("private")
            )
            return self.answer(
                409 if exists else 200,
                {"url": f"{self.server.address}/{name.removeprefix('models/')}"},
            )
        if parts == ["validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        files, _ = self.repo(parts)
        if files is None:
            return None
        if parts[3] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                200,
                {
                    "files": [
                        {"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names
                    ]
                },
            )
        assert parts[3] == "commit", self.path
        for line in body.splitlines():
            record = json.loads(line)
            if record["key"] == "file":
                files[record["value"]["path"]] = base64.b64decode(record["value"]["content"])
        commit = self.repo(parts)[1]
        address = (
            f"{self.server.address}/{'/'.join(parts[:3]).removeprefix('models/')}/commit/{commit}"
        )
        return self.answer(200, {"commitUrl": address, "commitOid": commit})

    def do_GET(self):
        path = unquote(self.path.split("?")[0]).strip("/")
        self.server.gets.append((self.command, path))
        if path.startswith("api/"):
            parts = path.split("/")[1:]
            files, commit = self.repo(parts)
            if files is not None and parts[3:4] == ["tree"]:
                entries = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in files.items()
                ]
                return self.answer(200, entries)
            siblings = [{"rfilename": name} for name in files or {}]
            return files is not None and self.answer(
                200, {"id": "/".join(parts[1:3]), "sha": commit, "siblings": siblings}
            )
        parts = path.split("/") if path.startswith("datasets/") else ["models", *path.split("/")]
        files, commit = self.repo(parts)
        if files is None:
            return None
        name = "/".join(parts[5:])  # after resolve/<revision>
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self.answer(
            200,
            files[name],
            ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"',
            X_Repo_Commit=commit,
        )

    do_HEAD = do_GET


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The server, and huggingface_hub with it for an endpoint: as by these variables, which it
    reads when it is imported."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.repos = {}
    server.private = {}
    server.gets = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "HF_TOKEN": "hf_test",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    huggingface_hub.close_session()  # the next one is made with these
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def make_folder(path, **cfg):
    sae = make_sae()
    sae.cfg |= {
        "hook_name": "mid.1",
        "fvu": 0.12345678,
        "l0": 4.0,
        "dead": 0.0,
        "num_held_out": 50,
    } | cfg
    sae.save_to_disk(path)
    (path / "metrics.jsonl").write_text("{}\n")
    (path / "checkpoint.safetensors").write_bytes(b"unfinished")
    return sae


def test_push_and_load(tmp_path, stand_in):
    """What is pushed is what lies in the folder with a card, and it is loaded as it was."""
    sae = make_folder(tmp_path / "run")
    assert (
        hub.push(tmp_path / "run", "me/saes", "sae", private=True) == f"{stand_in.address}/me/saes"
    )
    assert stand_in.private == {"models/me/saes": True}
    files = stand_in.repos["models/me/saes"]
    assert sorted(files) == ["README.md", "cfg.json", "metrics.jsonl", "sae.safetensors"]
    assert files["sae.safetensors"] == (tmp_path / "run/sae.safetensors").read_bytes()
    assert not (tmp_path / "run/README.md").exists()
    stand_in.gets.clear()
    assert torch.equal(Sae.load_from_hub("me/saes")(X), sae(X))
    fetched = {name for method, name in stand_in.gets if method == "GET" and "/resolve/" in name}
    assert {Path(name).name for name in fetched} == {"cfg.json", "sae.safetensors"}


def test_several_in_one_repository_and_the_card_that_is_there_stays(tmp_path, stand_in, capsys):
    make_folder(tmp_path / "a")
    sae = make_folder(tmp_path / "b", fvu=0.5)
    stand_in.repos["models/me/saes"] = {"mid.1/README.md": b"my own words"}
    for run, name in (("a", "mid.1"), ("b", "mid.2")):
        hub.push(tmp_path / run, "me/saes", "sae", name)
    files = stand_in.repos["models/me/saes"]
    assert files["mid.1/README.md"] == b"my own words"
    assert b"| 0.5 |" in files["mid.2/README.md"]
    assert b'Sae.load_from_hub("me/saes", "mid.2")' in files["mid.2/README.md"]
    assert capsys.readouterr().out.startswith("me/saes keeps its mid.1/README.md")
    assert {
        f"mid.{i}/{name}" for i in (1, 2) for name in ("cfg.json", "sae.safetensors")
    } < files.keys()
    stand_in.gets.clear()
    assert torch.equal(Sae.load_from_hub("me/saes", "mid.2")(X), sae(X))
    assert not any("mid.1/" in name for _, name in stand_in.gets)
    with pytest.raises(
        ValueError,
        match="me/saes has no sae.safetensors or sae_weights.safetensors; name the folder",
    ):
        Sae.load_from_hub("me/saes")


def test_a_readme_in_the_folder_is_the_card(tmp_path, stand_in):
    make_folder(tmp_path / "run")
    for text in ("mine", "mine too"):
        (tmp_path / "run/README.md").write_text(text)
        hub.push(tmp_path / "run", "me/saes", "sae")
        assert stand_in.repos["models/me/saes"]["README.md"] == text.encode()


def test_no_pickle_is_fetched(stand_in):
    stand_in.repos["models/me/dl"] = {"config.json": b"{}", "ae.pt": b"x"}
    with pytest.raises(ValueError, match="me/dl has no"):
        Sae.load_from_hub("me/dl")
    assert not any("ae.pt" in name for _, name in stand_in.gets)


def test_an_activation_folder(tmp_path, stand_in):
    """A folder of activations is pushed without its settings, and the example on its card works."""
    make_activations(tmp_path)
    assert hub.push(tmp_path, "me/acts", "activations") == f"{stand_in.address}/datasets/me/acts"
    files = stand_in.repos["datasets/me/acts"]
    assert files.keys() == {"README.md", "mid.1.npy", "mid.1.json", "samples.npy", "prompts.jsonl"}
    names = {}
    # what the card says works
    exec(files["README.md"].decode().split("```python\n")[1].split("```")[0], names)
    assert names["x"].shape == (2, 3, 4, 5)


def make_activations(folder):
    np.save(folder / "mid.1.npy", np.zeros((2, 3, 4, 5), np.float16))
    np.save(folder / "samples.npy", np.zeros((2, 3)))
    record = {
        "model": "toy",
        "guidance_scale": 7.5,
        "num_prompts": 2,
        "shape": [2, 3, 4, 5],
        "dtype": "float16",
        "rows": "cond",
    }
    (folder / "mid.1.json").write_text(json.dumps(record))
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')


@pytest.mark.parametrize(
    "repo_id, message", [("me/saes", "me/saes: .*401"), ("me/sa es", "me/sa es: Repo id must")]
)
def test_what_the_hub_says_is_an_oserror_with_the_name(
    tmp_path, stand_in, monkeypatch, repo_id, message
):
    make_folder(tmp_path / "run")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match=message):
        hub.push(tmp_path / "run", repo_id, "sae")
    with pytest.raises(OSError, match=f"{repo_id}: "):
        Sae.load_from_hub(repo_id)


def test_a_folder_of_several_saes_is_pushed_each_in_its_folder(tmp_path, stand_in):
    saes = {
        name: make_folder(tmp_path / "saes" / name, fvu=fvu)
        for name, fvu in (("one", 0.25), ("deep/two", 0.5))
    }
    export.main(export.Config(sae=str(tmp_path / "saes"), to_hub="me/saes", private=True))
    files = stand_in.repos["models/me/saes"]
    names = ("README.md", "cfg.json", "metrics.jsonl", "sae.safetensors")
    assert sorted(files) == sorted(f"{folder}/{name}" for folder in saes for name in names)
    assert stand_in.private == {"models/me/saes": True}
    for name, sae in saes.items():
        assert torch.equal(Sae.load_from_hub("me/saes", name)(X), sae(X))
        assert f'Sae.load_from_hub("me/saes", "{name}")' in files[f"{name}/README.md"].decode()


def test_activations_are_pushed_by_the_script(tmp_path, stand_in, capsys):
    make_activations(tmp_path)
    assert export.main(export.Config(activations=str(tmp_path), to_hub="me/acts")) == []
    assert capsys.readouterr().out == f"{stand_in.address}/datasets/me/acts\n"
    assert "mid.1.npy" in stand_in.repos["datasets/me/acts"]


def run_export(tmp_path, endpoint, *args):
    """export.py as a user calls it -> exit status, what it printed, what it complained of."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_test",
    }
    result = run_fresh("export.py", "--sae", "run", *args, cwd=tmp_path, **environment)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.slow
def test_the_script_pushes_what_it_exported(tmp_path, stand_in):
    make_folder(tmp_path / "run")
    code, out, error = run_export(
        tmp_path, stand_in.address, "--export", "saelens", "--to_hub", "me/lens"
    )
    assert code == 0, error
    assert out.splitlines()[-1] == f"{stand_in.address}/me/lens"
    files = stand_in.repos["models/me/lens"]
    assert files.keys() == {"README.md", "cfg.json", "sae_weights.safetensors"}
    card = files["README.md"].decode()
    assert "| latents M | 30 |" in card
    assert "| 0.1235 |" in card


@pytest.mark.slow
def test_the_script_where_there_is_no_hub(tmp_path, stand_in):
    make_folder(tmp_path / "run")
    code, _, error = run_export(tmp_path, "http://127.0.0.1:1", "--to_hub", "me/saes")
    assert code == 2, error
    assert error.startswith("export.py: error: me/saes: "), error
    assert error.count("\n") == 1, error


def test_the_card_of_an_sae(tmp_path):
    make_folder(tmp_path)
    text = hub.card(tmp_path, "me/saes", "sae", "mid.1")
    assert text.startswith("---\ntags:\n- sparse-autoencoder\n- diffusion\n---\n\n# mid.1\n")
    rows = dict(
        line.strip("| ").split(" | ")
        for line in text.splitlines()
        if line.startswith("| ") and line != "| | |"
    )
    assert (rows["hook name"], rows["vector width d"], rows["latents M"], rows["active k"]) == (
        "mid.1",
        "12",
        "30",
        "4",
    )
    assert rows["held-out vectors"] == "50"
    assert "training vectors" not in rows
    assert "model" not in rows
    assert 'Sae.load_from_hub("me/saes", "mid.1")' in text
    shared = make_sae(cfg=dict(activation="sampletopk"))
    shared.save_to_disk(tmp_path)
    assert "raw activations (samples, tokens, d)" in hub.card(tmp_path, "me/saes", "sae")


def test_folders_that_are_not_pushed(tmp_path):
    (tmp_path / "new").mkdir()
    for kind, message in (
        ("sae", "has no finished SAE"),
        ("activations", "has no activations"),
        ("model", "kind 'model'"),
    ):
        with pytest.raises(ValueError, match=message):
            hub.card(tmp_path / "new", "me/x", kind)
    with pytest.raises(ValueError, match="is no folder"):
        hub.card(tmp_path / "none", "me/x", "sae")
    make_activations(tmp_path / "new")
    (tmp_path / "new/other.npy.partial").touch()
    with pytest.raises(ValueError, match="not finished .other.npy.partial"):
        hub.card(tmp_path / "new", "me/x", "activations")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["pipeline.py", "unet/mine.py"])
def test_code_in_a_repository_runs_only_if_it_is_trusted(tmp_path, stand_in, model_folder, part):
    files = {}
    for path in model_folder.rglob("*"):
        if path.is_file():
            files[path.relative_to(model_folder).as_posix()] = path.read_bytes()
    index = json.loads(files["model_index.json"])
    name = "_class_name" if part == "pipeline.py" else "unet"
    base = index[name] if part == "pipeline.py" else index[name][1]
    index[name] = [Path(part).stem, "Mine"]
    files["model_index.json"] = json.dumps(index).encode()
    mark = tmp_path / "was_run"
    code = f"open({str(mark)!r}, 'w')\nfrom diffusers import {base}\nclass Mine({base}): pass\n"
    files[part] = code.encode()
    stand_in.repos["models/me/tiny"] = files
    environment = {
        "HF_ENDPOINT": stand_in.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
    }

    def collect(*words):
        options = "--list_hooks --num_inference_steps 2 --device cpu --model_name me/tiny"
        words = [*options.split(), "--dataset_name", "a red star", *words]
        return run_fresh("collect.py", *words, cwd=tmp_path, **environment)

    done = collect()
    assert done.returncode == 2 and not mark.exists(), done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "me/tiny comes with code of its own, which was not run" in last
    assert last.endswith("If you trust it, add --trust_remote_code")
    done = collect("--trust_remote_code")
    assert done.returncode == 0, done.stderr
    assert mark.exists() and "mid_block" in done.stdout
