"""Tokenizers and models small enough to be made on the spot."""

from pathlib import Path

import torch
import transformers as tf
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers

WORDS = ("the", "road", "of", "yellow", "bricks", "leads", "to", "a", "city", "that", "is", "green")
TEXTS = tuple(" ".join(WORDS[(5 * i + k) % 12] for k in range(1 + i % 9)) for i in range(32))


def byte_level(**special):
    """Like GPT-2's: characters may end in the middle of a token; no padding token but on request."""
    bpe = ByteLevelBPETokenizer()
    tokens = ["</s>", "[PAD]", "[CLS]"]
    bpe.train_from_iterator(TEXTS, vocab_size=290, special_tokens=tokens, show_progress=False)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, **{"eos_token": "</s>", "model_max_length": 64, **special}
    )


def word_pieces():
    """Like Llama's: a token begins with the space before its word, and what is unknown is bytes."""
    words = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -8.0), *((f"▁{word}", -2.0) for word in WORDS),
             *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]  # fmt: skip
    unigram = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def llama(tokenizer, kind: str = "LlamaForCausalLM", **settings):
    """One layer, drawn with seed 0; attends to 64 tokens."""
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(tf, kind)(config).eval()


def gpt2(tokenizer, kind: str = "GPT2LMHeadModel", context: int = 64):
    """As `llama`, with positions that are learned: beyond the context there are none."""
    config = tf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=context,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(tf, kind)(config).eval()


def saved(folder: Path, model, tokenizer) -> str:
    """A folder that holds both, as transformers writes it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
