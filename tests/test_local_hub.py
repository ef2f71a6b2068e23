"""The way for somebody without an account: publish to the checkout's own server, load from there."""

import subprocess
import sys

import pytest
from student import stage_student

import trainers.local_hub
from trainers.local_hub import local_hub, publish_to_local_hub


def test_published_and_loaded_by_the_snippet(tmp_path, tiny_llama, tiny_tokenizer):
    staged = stage_student(tmp_path / "published", tiny_llama, tiny_tokenizer)
    seen = publish_to_local_hub(staged, "alice/tiny")
    assert seen["url"].startswith("http://127.0.0.1:") and seen["url"].endswith("/alice/tiny")
    assert seen["tag"] == "v1" and 'repo, revision = "alice/tiny", "v1"' in seen["snippet"]
    # The tiny tokenizer knows neither of the prompt's words.
    assert seen["printed"].startswith("<unk> <unk>") and len(seen["printed"].split()) > 4


def test_server_is_gone_afterwards():
    with local_hub() as environment:
        code = "import sys; from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
        process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert process.stdout.strip() == "alice"
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode


def test_installed_without_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(trainers.local_hub, "SERVER", tmp_path / "hub_server.py")
    with pytest.raises(FileNotFoundError, match="installed without it"), local_hub():
        pass
