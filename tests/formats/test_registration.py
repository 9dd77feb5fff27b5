"""The method is known to transformers, whichever is imported first; without companion nothing opens."""

import importlib
import subprocess
import sys

import transformers as hf

from companion import W4, convert, prepare_qat
from companion.formats.registration import METHOD, TABLES, register_with_transformers

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


def test_tables_that_come_later_are_written_to():
    kept = sys.modules.pop(TABLES)
    finders = list(sys.meta_path)
    try:
        register_with_transformers()
        register_with_transformers()  # as when the package is reloaded
        assert len(sys.meta_path) == len(finders) + 1
        new = importlib.import_module(TABLES)
        assert new is not kept
        assert METHOD in new.AUTO_QUANTIZER_MAPPING
        assert METHOD in new.AUTO_QUANTIZATION_CONFIG_MAPPING
        assert sys.meta_path == finders
    finally:
        sys.modules[TABLES] = kept


def test_tables_that_are_there_are_written_to_once():
    register_with_transformers()
    assert METHOD in sys.modules[TABLES].AUTO_QUANTIZER_MAPPING


WITHOUT = """
import sys
import transformers as hf

def opened(kind, folder):
    try:
        getattr(hf, kind).from_pretrained(folder)
        return "opened"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

for line in sys.argv[1:]:
    print(opened(*line.split("=")))
assert "companion" not in sys.modules
import companion
print(opened(*sys.argv[1].split("=")))
"""


def test_without_companion_transformers_refuses_instead_of_drawing_weights(tmp_path):
    models = {
        "AutoModelForCausalLM": hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
        "AutoModel": hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
        "AutoModelForSequenceClassification": hf.BertForMaskedLM(hf.BertConfig(**SMALL)),
        "GPT2LMHeadModel": hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)
        ),
    }
    for kind, model in models.items():
        convert(prepare_qat(model, W4)).save_pretrained(tmp_path / kind)
    lines = [f"{kind}={tmp_path / kind}" for kind in models]
    run = subprocess.run([sys.executable, "-c", WITHOUT, *lines], check=True, capture_output=True,
                         text=True, cwd=tmp_path)  # fmt: skip
    *refusals, after = run.stdout.splitlines()
    assert len(refusals) == len(models)
    assert all("`ignore_mismatched_sizes` to `False`" in refusal for refusal in refusals), refusals
    assert after == "opened"  # transformers first, companion later
