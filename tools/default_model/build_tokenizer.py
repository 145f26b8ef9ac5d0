"""Trains the byte-level BPE tokenizer on the generated text and saves it to the model's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from world import KIND_SHARES, Generator, weighted
from world_render import END_OF_TEXT, IM_END, IM_START, MODEL_DIR, render_segments

VOCAB_SIZE = 2048
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
MAX_LENGTH = 2048
# Conversations with tools weigh less than in training: their texts are the longest.
SHARES = KIND_SHARES | {"tools": 8}
# A capital letter that no small letter follows is a token of its own: capitals are spelled.
# Contractions, words with their space, single digits, punctuation, white space: every digit is a
# token of its own, so that sums can be learned.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{Lu}(?!\p{Ll})|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(conversations: int, seed: int = 0) -> Tokenizer:
    """A byte-level BPE with all 256 bytes in its alphabet: every UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TOOL_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    generator = Generator("train", seed)
    kinds = (weighted(generator.rng, SHARES) for _ in range(conversations))
    texts = (
        "".join(text for text, _ in render_segments(generator.conversation(kind))) for kind in kinds
    )
    marks = "|".join(re.escape(mark) for mark in (*SPECIAL_TOKENS, *TOOL_TOKENS))
    pieces = (piece for text in texts for piece in re.split(marks, text) if piece)
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in TOOL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template inside)."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    added = [token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token.content)): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for token in added
        },
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": (MODEL_DIR / "chat_template.jinja").read_text(),
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": MAX_LENGTH,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n")


if __name__ == "__main__":
    save_tokenizer(train_tokenizer(12_000), MODEL_DIR)
